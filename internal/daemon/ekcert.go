package daemon

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"virt-trust/internal/domain"
	"virt-trust/internal/domain/libvirt"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/launcher/measure"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/vtpm/ek"
	"virt-trust/internal/vtpm/ekcert"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statedir"
)

// Certificates of vTPMs. While swtpm_setup makes a vTPM under an open grant it
// runs virt-trust-ekcert, which asks for them here, as a child of that very
// process; what was asked for stays with the grant. At `start`, when the vTPM's
// endorsement key has been read out of its state, the certificate goes into the
// record, if it is over that key.

// manufacture is what is known of a vTPM that is made under a grant.
type manufacture struct {
	fresh       bool            // swtpm_setup was run where there was no vTPM
	asked       map[string]bool // certificates, by what they are over
	key         list.Digest     // of the RSA EK, as Record.EKDigest
	certificate []byte          // over it
	tpm         ekcert.TPM
	ak          []byte // TPMT_PUBLIC
}

// certifier is the certificate chain above vTPM certificates.
type certifier struct {
	mu    sync.Mutex
	chain []*x509.Certificate // nil: not read yet
}

// certifierKey is the certifier as a crypto.Signer, as long as ctx lasts.
type certifierKey struct {
	ctx    context.Context
	tpm    TPM
	public *ecdsa.PublicKey
}

func (k certifierKey) Public() crypto.PublicKey { return k.public }

func (k certifierKey) Sign(_ io.Reader, digest []byte, _ crypto.SignerOpts) ([]byte, error) {
	if len(digest) != 32 {
		return nil, fmt.Errorf("a digest of %d bytes, not 32", len(digest))
	}
	return k.tpm.Sign(k.ctx, [32]byte(digest))
}

func (g *Guard) certifierKey(ctx context.Context) (certifierKey, error) {
	public := g.tpm.CertifierPublic()
	if public == nil {
		return certifierKey{}, g.tpmRefusal(hosttpm.ErrNotProvisioned)
	}
	return certifierKey{ctx, g.tpm, public}, nil
}

func random() (b [ekcert.SerialSize]byte) {
	rand.Read(b[:])
	return b
}

// issue has the certifier sign a certificate for a vTPM.
func (g *Guard) issue(ctx context.Context, r ekcert.Request) ([]byte, error) {
	key, err := g.certifierKey(ctx)
	if err != nil {
		return nil, err
	}
	r.Serial, r.Now = random(), g.now()
	der, err := ekcert.Issue(r, key)
	if err != nil {
		return nil, g.tpmRefusal(err)
	}
	return der, nil
}

// slot names a certificate of which a vTPM gets one.
func slot(kind ekcert.Kind, key crypto.PublicKey) string {
	if _, ok := key.(*rsa.PublicKey); ok {
		return string(kind) + " rsa"
	}
	return string(kind) + " ecc"
}

// CertifyEK makes a certificate of the kind for virt-trust-ekcert, the caller:
// over key, a SubjectPublicKeyInfo, for the vTPM that is just being made by the
// swtpm_setup that the caller is a child of. vm is what that was told, "" if
// nothing.
func (g *Guard) CertifyEK(ctx context.Context, kind ekcert.Kind, key []byte, vm string, tpm ekcert.TPM, c *caller) ([]byte, error) {
	public, err := ekcert.ParseKey(key)
	if err != nil {
		return nil, reason.Refuse(reason.PolicyForbids, "let libvirt start the VM", "the endorsement key cannot be read: %s", err)
	}
	if kind != ekcert.EK && kind != ekcert.Platform {
		return nil, reason.Refuse(reason.PolicyForbids, "let libvirt start the VM", "swtpm_setup gets no certificate of the kind %.20q", kind)
	}
	digest, name := list.DigestOf(key), slot(kind, public)
	gr, err := g.claim(name, digest, kind, vm, c)
	if err != nil {
		return nil, err
	}
	der, err := g.issue(ctx, ekcert.Request{Kind: kind, Key: public, VM: gr.uuid, Origin: ekcert.Manufactured, TPM: tpm})
	g.mu.Lock()
	defer g.mu.Unlock()
	if err != nil {
		delete(gr.made.asked, name) // it may be tried again
		return nil, err
	}
	if name == slot(ekcert.EK, &rsa.PublicKey{}) {
		gr.made.certificate, gr.made.tpm = der, tpm
	}
	return der, nil
}

// claim finds the grant under which the caller may have a certificate, and
// takes it for that key.
func (g *Guard) claim(name string, digest list.Digest, kind ekcert.Kind, vm string, c *caller) (*grant, error) {
	no := func(what string, args ...any) error {
		return reason.Refuse(reason.PolicyForbids, "start the VM again", what, args...)
	}
	store := g.peek()
	g.mu.Lock()
	defer g.mu.Unlock()
	var gr *grant
	for _, o := range g.grants {
		if o.setupPID == c.parent && o.setupRuns() {
			gr = o
		}
	}
	switch {
	case gr == nil:
		return nil, reason.Refuse(reason.PolicyForbids, "let libvirt start the VM", "certificates are for a swtpm_setup that makes a VM's vTPM under a launch grant")
	case !gr.certify:
		return nil, no("this vTPM is not a new one, or gets no certificate")
	case gr.cgroup != c.cgroup:
		return nil, no("virt-trust-ekcert was not called by libvirt's swtpm_setup")
	case g.now().After(gr.expires):
		return nil, no("the grant for this start has expired")
	case vm != "" && vm != gr.uuid:
		return nil, no("the certificate is for the VM %.60q, and the grant for %s", vm, gr.uuid)
	case gr.made.asked[name]:
		return nil, no("the vTPM has its certificate (%s) already", name)
	case kind == ekcert.Platform && gr.made.key != digest:
		return nil, no("the platform's certificate is not over the vTPM's endorsement key")
	}
	for _, o := range g.grants {
		if o != gr && o.made.key == digest {
			return nil, no("this endorsement key is that of the VM %s", o.uuid)
		}
	}
	if store != nil {
		for _, r := range store.All() {
			if r.UUID != gr.uuid && r.EKDigest == digest {
				return nil, no("this endorsement key is that of the VM %s", r.UUID)
			}
		}
	}
	if gr.made.asked == nil {
		gr.made.asked = map[string]bool{}
	}
	gr.made.asked[name] = true
	if name == slot(ekcert.EK, &rsa.PublicKey{}) {
		gr.made.key = digest
	}
	return gr, nil
}

// noteIdentity puts what a vTPM's manufacture has given into its record: n, a
// clone, whose EKDigest is what the state holds. It gives what the journal
// should say.
func (g *Guard) noteIdentity(ctx context.Context, n *list.Record, m manufacture) (notes []note) {
	if m.fresh {
		n.EKCertificate, n.AKPublic, n.AKCertificate = nil, nil, nil // of the vTPM before this one
	}
	switch {
	case m.certificate == nil:
	case m.key == n.EKDigest:
		n.EKCertificate = m.certificate
		notes = append(notes, note{journal.Certified, "the vTPM's endorsement key got its certificate"})
	default:
		notes = append(notes, note{journal.Refused, fmt.Sprintf("the vTPM's endorsement key (%s) is not the one that swtpm_setup had certified (%s): its certificate is not kept", n.EKDigest, m.key)})
	}
	if m.ak == nil {
		return notes
	}
	n.AKPublic = m.ak
	key, err := ek.ParseAK(m.ak)
	if err == nil {
		n.AKCertificate, err = g.issue(ctx, ekcert.Request{Kind: ekcert.AK, Key: key, VM: n.UUID, Origin: ekcert.Manufactured, TPM: m.tpm})
	}
	if n.AKDue = err != nil; n.AKDue {
		notes = append(notes, note{text: "the vTPM's AK has no certificate: " + err.Error()})
	}
	return notes
}

// sharers gives the other VMs whose vTPMs have the same endorsement key.
func sharers(store *liststore.Store, r *list.Record) []string {
	others := []string{}
	if r.EKDigest.IsZero() {
		return others
	}
	for _, o := range store.All() {
		if o.UUID != r.UUID && o.EKDigest == r.EKDigest {
			others = append(others, o.UUID)
		}
	}
	slices.Sort(others)
	return others
}

// sharedNote says what is wrong with an endorsement key that others have too;
// "" where nothing is.
func sharedNote(store *liststore.Store, r *list.Record) string {
	var names []string
	for _, uuid := range sharers(store, r) {
		name := uuid
		if o := store.Get(uuid); o != nil {
			name = fmt.Sprintf("%s (%s)", o.Name, uuid)
		}
		names = append(names, name)
	}
	if len(names) == 0 {
		return ""
	}
	return "its vTPM has the same endorsement key as that of " + strings.Join(names, ", ") + ": one is a copy of the other"
}

// IssueEK makes a certificate for a vTPM that has none: one that was made
// before virt-trust, or whose certificate was of a host before this one. It
// cannot be put into the vTPM, whose NV memory is the guest's: it is kept, and
// given out by virt-trustd.
func (g *Guard) IssueEK(ctx context.Context, d libvirt.Domain, f *domain.Facts) (what string, err error) {
	defer g.lock(f.UUID)()
	store, err := g.List(ctx)
	if err != nil {
		return "", err
	}
	r := store.Get(f.UUID)
	switch {
	case r == nil || r.State == list.Released:
		return "", reason.Refuse(reason.VTPMUnknown, "'virt-trust adopt' takes it in", "the vTPM is not in the vTPM list")
	case r.KeyOwner != list.Ours:
		return "", reason.Refuse(reason.PolicyForbids, "remove the <encryption> of its definition", "the vTPM's key is libvirt's: its endorsement key cannot be read")
	case f.TPM == nil || f.TPM.Version != "2.0":
		return "", reason.Refuse(reason.PolicyForbids, "give the VM a TPM 2.0", "only a TPM 2.0 gets a certificate")
	case g.launch.ek == nil:
		return "", errors.New("no endorsement keys are read here")
	}
	if key, err := g.certifierKey(ctx); err != nil {
		return "", err
	} else if ekcert.IssuedBy(r.EKCertificate, key.public) {
		return "the vTPM has a certificate by this host's certifier already", nil
	}
	all, err := g.launchers(ctx, f)
	if err != nil {
		return "", err
	}
	state, err := g.kept(r.UUID, keptState)
	if errors.Is(err, fs.ErrNotExist) {
		return "", reason.Refuse(reason.VTPMMissing, "start the VM once", "the VM has no vTPM yet")
	} else if err != nil {
		return "", err
	}
	keys, err := g.unwrap(ctx, r.WrappedKeys)
	if err != nil {
		return "", err
	}
	defer keys.Wipe()
	reader := g.reader(all)
	id, err := reader.Identity(ctx, statedir.StateFile(r.Instance), state, stateKey(keys))
	if err != nil {
		return "", fmt.Errorf("reading the vTPM's endorsement key: %w", err)
	}
	n := r.Clone()
	n.EKDigest = list.DigestOf(id.EK)
	if !r.EKDigest.IsZero() && r.EKDigest != n.EKDigest {
		return "", reason.Refuse(reason.VTPMChanged, "'virt-trust check' says more", "the vTPM's endorsement key is not the one that it had before")
	}
	if shared := sharedNote(store, n); shared != "" {
		return "", reason.Refuse(reason.PolicyForbids, "remove the vTPM of the copy", "%s", shared)
	}
	public, err := ekcert.ParseKey(id.EK)
	if err != nil {
		return "", err
	}
	n.EKCertificate, err = g.issue(ctx, ekcert.Request{
		Kind: ekcert.EK, Key: public, VM: r.UUID, Origin: ekcert.TakenIn,
		TPM: tpmOf(id),
	})
	if err != nil {
		return "", err
	}
	if err := store.Commit(liststore.Change{Put: n}); err != nil {
		return "", err
	}
	g.report(r.UUID, r.Name, "issue", noted, "", "the vTPM's endorsement key got a certificate", journal.Certified)
	g.changed(r.UUID)
	return "the vTPM's endorsement key got a certificate, which is kept here and is not in the vTPM", nil
}

// tpmOf is what a vTPM says of itself, for a certificate.
func tpmOf(id ek.Identity) ekcert.TPM {
	return ekcert.TPM{Manufacturer: id.Manufacturer, Version: id.Version, Family: id.Family, Level: id.Level, Revision: id.Revision}
}

// reader reads vTPMs with the swtpm that is among the launchers.
func (g *Guard) reader(all []launcher) ek.Reader {
	reader := *g.launch.ek
	for _, l := range all {
		if l.Role == measure.Swtpm {
			reader.Swtpm = l.Path
		}
	}
	return reader
}

func (g *Guard) chainPath() string { return filepath.Join(g.dirs.State, "certifier.pem") }

// certifierChain gives the certificates above those of vTPMs, the certifier's
// first, and makes that where there is none, or none that is over this host's
// key and valid. Nobody waits for the TPM who does not need it.
func (g *Guard) certifierChain(ctx context.Context) ([]*x509.Certificate, error) {
	key, err := g.certifierKey(ctx)
	if err != nil {
		return nil, err
	}
	g.certifier.mu.Lock()
	chain := g.validChain(key.public)
	g.certifier.mu.Unlock()
	if chain != nil {
		return chain, nil
	}
	der, err := ekcert.SelfSigned(key, random(), g.now())
	if err != nil {
		return nil, g.tpmRefusal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	g.certifier.mu.Lock()
	defer g.certifier.mu.Unlock()
	if chain := g.validChain(key.public); chain != nil { // another was quicker, or the CA
		return chain, nil
	}
	return []*x509.Certificate{c}, g.keepChain([]*x509.Certificate{c})
}

// validChain gives the chain that is there, nil where there is none over this key
// and valid. Called with certifier.mu held.
func (g *Guard) validChain(key *ecdsa.PublicKey) []*x509.Certificate {
	if g.certifier.chain != nil && ekcert.VerifyChain(g.certifier.chain, key, g.now()) == nil {
		return g.certifier.chain
	}
	b, err := os.ReadFile(g.chainPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var chain []*x509.Certificate
	if err == nil {
		chain, err = ekcert.ParseChain(b)
	}
	if err == nil {
		err = ekcert.VerifyChain(chain, key, g.now())
	}
	if err != nil {
		g.log.WithError(err).Warnf("the certifier's chain in %s is not used any more", g.chainPath())
		return nil
	}
	g.certifier.chain = chain
	return chain
}

// keepChain writes a chain. Called with certifier.mu held.
func (g *Guard) keepChain(chain []*x509.Certificate) error {
	if err := liststore.WriteFile(g.chainPath(), ekcert.EncodeChain(chain), 0o644); err != nil {
		return fmt.Errorf("writing the certifier's chain: %w", err)
	}
	g.certifier.chain = chain
	return nil
}

// SetCertifierChain takes the certificate that a CA gave the certifier, and
// those above it, in PEM.
func (g *Guard) SetCertifierChain(ctx context.Context, text []byte) error {
	key, err := g.certifierKey(ctx)
	if err != nil {
		return err
	}
	chain, err := ekcert.ParseChain(text)
	if err == nil {
		err = ekcert.VerifyChain(chain, key.public, g.now())
	}
	if err != nil {
		return reason.Refuse(reason.PolicyForbids, "have the Verifier's CA make another", "the certificate for the certifier cannot be used: %s", err)
	}
	g.certifier.mu.Lock()
	defer g.certifier.mu.Unlock()
	if slices.EqualFunc(g.certifier.chain, chain, (*x509.Certificate).Equal) {
		return nil // the agent brings it at each of its starts
	}
	if err := g.keepChain(chain); err != nil {
		return err
	}
	g.log.WithField(journal.ID, journal.CertifierSet).Infof("the certifier has a certificate by %.200q, valid until %s", chain[0].Issuer.String(), chain[0].NotAfter.UTC().Format("2006-01-02T15:04:05Z"))
	return nil
}

// chainText gives the chain in PEM if there is one, without asking the TPM.
func (g *Guard) chainText() string {
	g.certifier.mu.Lock()
	defer g.certifier.mu.Unlock()
	return string(ekcert.EncodeChain(g.certifier.chain))
}
