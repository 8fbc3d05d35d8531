package ekcert

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"path/filepath"
	"strings"
)

// Call is what swtpm_setup asks for (swtpm_setup.conf(5), create_certs_tool).
type Call struct {
	Type         string // ek, platform
	Key          crypto.PublicKey
	Dir          string // where the certificate goes
	VM           string // UUID, "" where --vmid has none
	Manufacturer string
	Version      string
	Family       string
	Level        int
	Revision     int
}

// File is the certificate's path: swtpm_setup reads it there.
func (c Call) File() string { return filepath.Join(c.Dir, c.Type+".cert") }

// maxKey bounds, in bytes, --ek: RSA 3072 takes 768 digits.
const maxKey = 2048

// Parse reads the arguments, without the program's name. What it does not know
// is an error: it may be about the certificate.
func Parse(args []string) (Call, error) {
	var c Call
	f := flag.NewFlagSet("virt-trust-ekcert", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&c.Type, "type", "", "")
	f.StringVar(&c.Dir, "dir", "", "")
	f.StringVar(&c.Manufacturer, "tpm-manufacturer", "", "")
	f.StringVar(&c.Version, "tpm-version", "", "")
	f.StringVar(&c.Family, "tpm-spec-family", "", "")
	f.IntVar(&c.Level, "tpm-spec-level", 0, "")
	f.IntVar(&c.Revision, "tpm-spec-revision", 0, "")
	key, vmid := f.String("ek", "", ""), f.String("vmid", "", "")
	tpm2, signing := f.Bool("tpm2", false, ""), f.Bool("allow-signing", false, "")
	for _, ignored := range []string{"logfile", "configfile", "optsfile", "tpm-model"} {
		f.String(ignored, "", "")
	}
	f.Bool("decryption", false, "") // what an EK is for
	if err := f.Parse(args); err != nil {
		return c, err
	}
	switch {
	case f.NArg() > 0:
		return c, fmt.Errorf("unexpected argument %.60q", f.Arg(0))
	case c.Type != "ek" && c.Type != "platform":
		return c, fmt.Errorf("there is no certificate of the type %.20q", c.Type)
	case !*tpm2:
		return c, errors.New("only a TPM 2.0 gets a certificate")
	case *signing:
		return c, errors.New("an EK that signs (--allow-signing) gets no certificate")
	case !filepath.IsAbs(c.Dir):
		return c, fmt.Errorf("--dir %.200q is no absolute path", c.Dir)
	}
	// A VM's name may hold colons, a UUID holds none.
	if i := strings.LastIndexByte(*vmid, ':'); i >= 0 {
		c.VM = (*vmid)[i+1:]
	}
	var err error
	c.Key, err = parseKey(*key)
	return c, err
}

// parseKey reads --ek: an RSA modulus, or a point as x=H,y=H,id=CURVE.
func parseKey(s string) (crypto.PublicKey, error) {
	if len(s) > maxKey {
		return nil, fmt.Errorf("--ek has %d bytes, at most %d are read", len(s), maxKey)
	}
	if !strings.Contains(s, "=") {
		n, err := number(s)
		if err != nil {
			return nil, err
		}
		return &rsa.PublicKey{N: n, E: 65537}, nil // TCG EK Credential Profile, template L-1: the default exponent
	}
	parts := map[string]string{}
	for p := range strings.SplitSeq(s, ",") {
		k, v, _ := strings.Cut(p, "=")
		if _, twice := parts[k]; twice || k != "x" && k != "y" && k != "id" {
			return nil, fmt.Errorf("--ek: %.20q is not expected", k)
		}
		parts[k] = v
	}
	curve, ok := map[string]elliptic.Curve{"": elliptic.P256(), "secp256r1": elliptic.P256(), "secp384r1": elliptic.P384()}[parts["id"]]
	if !ok {
		return nil, fmt.Errorf("--ek: the curve %.20q is not known", parts["id"])
	}
	x, err := number(parts["x"])
	if err != nil {
		return nil, err
	}
	y, err := number(parts["y"])
	if err != nil {
		return nil, err
	}
	size := (curve.Params().BitSize + 7) / 8
	if x.BitLen() > 8*size || y.BitLen() > 8*size {
		return nil, errors.New("--ek: a coordinate that is too large")
	}
	point := append([]byte{4}, x.FillBytes(make([]byte, size))...)
	point = append(point, y.FillBytes(make([]byte, size))...)
	key, err := ecdsa.ParseUncompressedPublicKey(curve, point)
	if err != nil {
		return nil, fmt.Errorf("--ek: %w", err)
	}
	return key, nil
}

func number(s string) (*big.Int, error) {
	if s == "" || strings.Trim(s, "0123456789abcdefABCDEF") != "" {
		return nil, errors.New("--ek: not a number in hexadecimal")
	}
	n, _ := new(big.Int).SetString(s, 16)
	if n == nil || n.Sign() == 0 {
		return nil, errors.New("--ek: not a number in hexadecimal")
	}
	return n, nil
}
