package admin

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"virt-trust/internal/platform/config"
)

// verifierFlags are those of every command that asks a Verifier; what they do
// not say comes from client.toml.
type verifierFlags struct{ url, ca, tokenFile string }

func (f *verifierFlags) add(cmd *cobra.Command) {
	cmd.PersistentFlags().StringVar(&f.url, "verifier", "", "the Verifier, https://HOST:PORT (client.toml)")
	cmd.PersistentFlags().StringVar(&f.ca, "ca", "", "file with the certificate of its CA (client.toml, or the system's)")
	cmd.PersistentFlags().StringVar(&f.tokenFile, "token-file", "", "file with your token, \"-\" for standard input (client.toml)")
}

// verifier is a connection to a Verifier, as one person.
type verifier struct {
	url, token string
	client     *http.Client
}

// Bounds of what a Verifier may answer, in bytes, and how long it may take.
const (
	maxAnswer  = 64 << 20
	answerTime = time.Minute
)

func (c *Command) verifier(f *verifierFlags) (*verifier, error) {
	paths := c.ClientPaths
	if paths == nil {
		if dir, err := os.UserConfigDir(); err == nil {
			paths = append(paths, filepath.Join(dir, "virt-trust", "client.toml"))
		}
		paths = append(paths, config.ClientPath)
	}
	cfg, err := config.LoadClient(paths...)
	if err != nil {
		return nil, err
	}
	cfg.Verifier, cfg.CA, cfg.TokenFile = cmp.Or(f.url, cfg.Verifier), cmp.Or(f.ca, cfg.CA), cmp.Or(f.tokenFile, cfg.TokenFile)
	if cfg.Verifier == "" {
		return nil, &exit{ExitUsage, errors.New("which Verifier? --verifier, or verifier in " + config.ClientPath)}
	}
	if err := (config.Client{Verifier: cfg.Verifier}).Check(); err != nil {
		return nil, &exit{ExitUsage, err}
	}
	t := &tls.Config{MinVersion: tls.VersionTLS13}
	if cfg.CA != "" {
		pem, err := os.ReadFile(cfg.CA)
		if err != nil {
			return nil, err
		}
		if t.RootCAs = x509.NewCertPool(); !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s: no certificate in PEM", cfg.CA)
		}
	}
	v := &verifier{url: strings.TrimSuffix(cfg.Verifier, "/"), client: &http.Client{
		Transport: &http.Transport{TLSClientConfig: t, TLSHandshakeTimeout: answerTime, Proxy: http.ProxyFromEnvironment},
		// A Verifier never leads elsewhere, and the token is for it alone.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	switch cfg.TokenFile {
	case "":
	case "-":
		v.token, err = token(c.Stdin)
	default:
		v.token, err = tokenFile(cfg.TokenFile)
	}
	return v, err
}

func tokenFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return token(f)
}

func token(r io.Reader) (string, error) {
	b, err := io.ReadAll(io.LimitReader(r, 16<<10))
	if err != nil {
		return "", err
	}
	t := strings.TrimSpace(string(b))
	if t == "" || strings.ContainsAny(t, " \r\n\t") {
		return "", errors.New("the token's file has no token in it, or more than one")
	}
	return t, nil
}

// problem is a Verifier's refusal (RFC 9457).
type problem struct {
	Title  string `json:"title"`
	Detail string `json:"detail"`
	Code   string `json:"code"`
	Status int    `json:"status"`
}

func (p *problem) Error() string {
	text := cmp.Or(p.Detail, p.Title, "HTTP status "+strconv.Itoa(p.Status))
	if p.Code == "" {
		return "the Verifier: " + text
	}
	return "the Verifier: " + p.Code + ": " + text
}

// code is the exit code that a refusal leads to.
func (p *problem) exit() int {
	switch {
	case p.Status == http.StatusServiceUnavailable:
		return ExitNotAppraised
	case p.Status == http.StatusBadRequest || p.Status >= 500:
		return ExitFailed
	}
	return ExitRefused
}

// ask sends a request, with a JSON body unless that is nil, and gives the answer.
func (v *verifier) ask(ctx context.Context, method, path string, body any) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	resp, err := v.send(ctx, method, path, body)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err == nil && len(b) > maxAnswer {
		err = fmt.Errorf("the Verifier's answer is longer than %d bytes", maxAnswer)
	}
	return b, err
}

// send gives the response if it is a good one, with its body to be closed.
func (v *verifier) send(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var in []byte
	if body != nil {
		var err error
		if in, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	r, err := http.NewRequestWithContext(ctx, method, v.url+path, bytes.NewReader(in))
	if err != nil {
		return nil, err
	}
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	if v.token != "" {
		r.Header.Set("Authorization", "Bearer "+v.token)
	}
	resp, err := v.client.Do(r)
	if err != nil {
		return nil, fmt.Errorf("the Verifier: %w", err)
	}
	if resp.StatusCode >= 200 && resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	p := &problem{}
	if b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10)); err != nil || json.Unmarshal(b, p) != nil {
		p = &problem{}
	}
	p.Status = resp.StatusCode
	return nil, &exit{p.exit(), p}
}

// get reads an answer.
func get[T any](ctx context.Context, v *verifier, path string) (T, json.RawMessage, error) {
	return call[T](ctx, v, http.MethodGet, path, nil)
}

func call[T any](ctx context.Context, v *verifier, method, path string, body any) (t T, raw json.RawMessage, err error) {
	b, err := v.ask(ctx, method, path, body)
	if err != nil || len(b) == 0 {
		return t, nil, err
	}
	if err := json.Unmarshal(b, &t); err != nil {
		return t, nil, fmt.Errorf("the Verifier's answer: %w", err)
	}
	return t, b, nil
}

// all reads every page of a list, most of limit items (0: all).
func all[T any](ctx context.Context, v *verifier, path string, query url.Values, most int) ([]T, []json.RawMessage, error) {
	items, raws := []T{}, []json.RawMessage{}
	if query == nil {
		query = url.Values{}
	}
	query.Set("limit", strconv.Itoa(min(cmp.Or(most, 1000), 1000)))
	for {
		page, _, err := get[struct {
			Items []json.RawMessage `json:"items"`
			Next  string            `json:"next"`
		}](ctx, v, path+"?"+query.Encode())
		if err != nil {
			return nil, nil, err
		}
		for _, raw := range page.Items {
			if most > 0 && len(items) == most {
				return items, raws, nil
			}
			var t T
			if err := json.Unmarshal(raw, &t); err != nil {
				return nil, nil, fmt.Errorf("the Verifier's answer: %w", err)
			}
			items, raws = append(items, t), append(raws, raw)
		}
		if page.Next == "" || page.Next == query.Get("after") {
			return items, raws, nil
		}
		query.Set("after", page.Next)
	}
}

// verified is a command that asks a Verifier.
func (c *Command) verified(f *verifierFlags, run func(ctx context.Context, v *verifier, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		v, err := c.verifier(f)
		if err != nil {
			return err
		}
		return run(cmd.Context(), v, args)
	}
}

// parent is a command that only has others below it.
func parent(use, short string) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return &exit{ExitUsage, fmt.Errorf("a command is missing; see '%s --help'", cmd.CommandPath())}
		},
	}
}
