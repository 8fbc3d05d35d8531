//go:build deps

package verifier
import (
 _ "github.com/go-jose/go-jose/v4"
 _ "github.com/go-jose/go-jose/v4/jwt"
 _ "modernc.org/sqlite"
 _ "github.com/jackc/pgx/v5/stdlib"
 _ "github.com/jackc/pgx/v5/pgxpool"
 _ "github.com/pressly/goose/v3"
 _ "github.com/prometheus/client_golang/prometheus/promhttp"
 _ "github.com/prometheus/client_golang/prometheus/testutil"
 _ "github.com/coreos/go-oidc/v3/oidc"
 _ "golang.org/x/oauth2"
 _ "github.com/getkin/kin-openapi/openapi3"
 _ "github.com/getkin/kin-openapi/openapi3filter"
 _ "github.com/getkin/kin-openapi/routers/gorillamux"
 _ "github.com/chromedp/chromedp"
 _ "golang.org/x/time/rate"
 _ "pgregory.net/rapid"
)
