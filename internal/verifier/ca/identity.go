package ca

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// The object identifiers. They stem from the UUID
// 6debb6d9-39f0-4116-bd6a-c1988fc9dbc1, in the arc that Microsoft gives away for
// that (its oidgen.vbs): an arc of 2.25 would be a number of 128 bits, and
// crypto/x509 rejects every certificate that has one of more than 31 in an
// extension's name.
var (
	oidArc = asn1.ObjectIdentifier{1, 2, 840, 113556, 1, 8000, 2554, 28139, 46809, 14832, 16662, 48490, 12687503, 13228993}
	// OIDNode names the extension with a node's Identity.
	OIDNode = slices.Concat(oidArc, asn1.ObjectIdentifier{1})
	// OIDEKCertificate is tcg-kp-EKCertificate (TCG EK Credential Profile, 3.2.16).
	OIDEKCertificate = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
	// certifierUses are what a node's certifier may sign for: EK, platform and AK of
	// a vTPM (tcg-kp).
	certifierUses = []asn1.ObjectIdentifier{OIDEKCertificate, {2, 23, 133, 8, 2}, {2, 23, 133, 8, 3}}
)

// Identity is what a node's certificate says of it, beside its TLS key.
type Identity struct {
	Node string // ID, a UUID
	Name string
	EK   []byte // SHA-256 of its SubjectPublicKeyInfo, as the Verifier knows EKs
	AK   []byte // TPM Name: hash algorithm and digest of the public area
	Bind []byte // TPM Name
	// AKPublic is the public area itself (TPMT_PUBLIC), of which AK is the Name, for
	// who has nothing but the certificate. Older certificates lack it: nil.
	AKPublic []byte
}

//	NodeIdentity ::= SEQUENCE {
//	    version  INTEGER (1),
//	    node     UTF8String,  -- UUID
//	    name     UTF8String,
//	    ek       OCTET STRING, -- SHA-256 of the SubjectPublicKeyInfo
//	    ak       OCTET STRING, -- TPM Name
//	    bind     OCTET STRING, -- TPM Name
//	    akPublic [0] IMPLICIT OCTET STRING OPTIONAL -- TPMT_PUBLIC -- }
type nodeIdentity struct {
	Version  int
	Node     string `asn1:"utf8"`
	Name     string `asn1:"utf8"`
	EK       []byte
	AK, Bind []byte
	AKPublic []byte `asn1:"optional,tag:0"` // who does not know it passes it over
}

// Bounds of a node's name, and of TPM Names.
const (
	MaxName    = 253
	maxTPMName = 66
)

var (
	uuidPattern = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
	// namePattern is a host name's (RFC 1123, 2.1), with _ for those that have it.
	namePattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$`)
)

// ValidNode reports whether id is spelt as a node's ID.
func ValidNode(id string) bool { return uuidPattern.MatchString(id) }

// ValidName reports whether a node may have this name.
func ValidName(name string) bool { return len(name) <= MaxName && namePattern.MatchString(name) }

// FoldName spells a name as nodes have it. Host names do not differ by case (RFC 4343),
// and letters that only look alike are in none: ValidName.
func FoldName(name string) string { return strings.ToLower(name) }

func (i Identity) check() error {
	if !ValidNode(i.Node) || !ValidName(i.Name) {
		return fmt.Errorf("node %.40q with name %.40q", i.Node, i.Name)
	}
	if len(i.EK) != sha256.Size {
		return fmt.Errorf("digest of an EK of %d bytes", len(i.EK))
	}
	for _, n := range [][]byte{i.AK, i.Bind} {
		if len(n) < 22 || len(n) > maxTPMName {
			return fmt.Errorf("TPM Name of %d bytes", len(n))
		}
	}
	if i.AKPublic != nil {
		if name, err := nameOf(i.AKPublic); err != nil || !bytes.Equal(name, i.AK) {
			return errors.New("an AK that has another Name")
		}
	}
	return nil
}

func (i Identity) extension() (pkix.Extension, error) {
	if err := i.check(); err != nil {
		return pkix.Extension{}, err
	}
	der, err := asn1.Marshal(nodeIdentity{Version: 1, Node: i.Node, Name: i.Name, EK: i.EK, AK: i.AK, Bind: i.Bind, AKPublic: i.AKPublic})
	return pkix.Extension{Id: OIDNode, Value: der}, err
}

var errNoIdentity = errors.New("it has no node identity")

// UntrustedIdentity reads the Identity in a certificate, whoever signed that:
// see Authority.VerifyNode.
func UntrustedIdentity(c *x509.Certificate) (Identity, error) {
	for _, e := range c.Extensions {
		if !e.Id.Equal(OIDNode) {
			continue
		}
		var n nodeIdentity
		rest, err := asn1.Unmarshal(e.Value, &n)
		switch {
		case err != nil:
			return Identity{}, fmt.Errorf("node identity: %w", err)
		case len(rest) > 0 || n.Version != 1:
			return Identity{}, errors.New("node identity of another form")
		}
		i := Identity{Node: n.Node, Name: n.Name, EK: n.EK, AK: n.AK, Bind: n.Bind, AKPublic: n.AKPublic}
		if err := i.check(); err != nil {
			return Identity{}, fmt.Errorf("node identity: %w", err)
		}
		return i, nil
	}
	return Identity{}, errNoIdentity
}
