package daemon

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/sirupsen/logrus"

	"virt-trust/internal/bus"
	"virt-trust/internal/domain"
	"virt-trust/internal/ekcert"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/launcher/measure"
	"virt-trust/internal/launcher/pkgdb"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/ek"
	profile "virt-trust/internal/vtpm/ekcert"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statefile"
	"virt-trust/internal/wrap"
)

// manufactureInChild is the wrapper, under the names swtpm and swtpm_setup, and
// virt-trust-ekcert, which swtpm_setup runs.
func manufactureInChild() int {
	log := logrus.New()
	log.Out = io.Discard
	if filepath.Base(os.Args[0]) == "ekcert" {
		t := ekcert.Tool{Args: os.Args[1:], Stderr: os.Stderr, Log: log, Certify: ekcert.Certify}
		return t.Run()
	}
	w := wrap.Wrapper{
		Args: os.Args, Env: os.Environ(), Path: os.Getenv("PATH"), Self: "/proc/self/exe", Stderr: os.Stderr,
		CertsTool: os.Getenv("CERTS_TOOL"), Log: log, Redeem: wrap.Redeem,
	}
	return w.Run()
}

// factory is an office whose VMs get real vTPMs, by the real swtpm_setup
// through the real wrapper.
type factory struct {
	*office
	conf string        // swtpm_setup.conf of the admin
	cpu  time.Duration // of all swtpm_setups so far, and of what they ran
}

func openFactory(t testing.TB, change ...func(*config.Config)) *factory {
	t.Helper()
	o := openOffice(t)
	for _, c := range change {
		c(&o.g.cfg)
	}
	dir := testkit.Folder(t)
	o.g.launch.ek = &ek.Reader{Dir: dir, UID: os.Getuid(), GID: os.Getgid()}
	o.g.launch.measurer, o.g.launch.packages = &measure.Measurer{}, pkgdb.DB{Dpkg: filepath.Join(o.root, "dpkg")}
	os.Symlink(filepath.Join(o.programs, "wrapper"), filepath.Join(o.programs, "bin", "swtpm_setup"))
	f := &factory{office: o, conf: filepath.Join(dir, "swtpm_setup.conf")}
	os.WriteFile(f.conf, []byte("create_certs_tool = /bin/false\nactive_pcr_banks = sha384\n"), 0o644)
	return f
}

func ownCgroup(t testing.TB) string {
	t.Helper()
	return string(testkit.Must[[]byte](t)(os.ReadFile("/proc/self/cgroup")))
}

// setup runs swtpm_setup as libvirt 9.0 does.
func (o *factory) setup(f *domain.Facts) (string, error) {
	o.t.Helper()
	o.mkdir(f.UUID)
	c := exec.Command(filepath.Join(o.programs, "bin", "swtpm_setup"), "--tpm2", "--tpm-state", o.dir(f.UUID), "--vmid", f.Name+":"+f.UUID, "--config", o.conf,
		"--createek", "--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--not-overwrite")
	c.Env = []string{
		"PATH=" + filepath.Join(o.programs, "bin") + ":/usr/bin:/bin", childMode + "=manufacture",
		"DBUS_SYSTEM_BUS_ADDRESS=" + o.address, "CERTS_TOOL=" + filepath.Join(o.programs, "ekcert"),
	}
	c.SysProcAttr, c.WaitDelay = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}, 10*time.Second
	out, err := c.CombinedOutput()
	o.cpu += c.ProcessState.UserTime() + c.ProcessState.SystemTime()
	return string(out), err
}

// manufactured takes a new VM to `start`.
func (o *factory) manufactured(uuid string) *domain.Facts {
	o.t.Helper()
	f := o.vm(uuid, false)
	if err := o.g.Prepare(background, f, ownCgroup(o.t), nil); err != nil {
		o.t.Fatal(err)
	}
	if out, err := o.setup(f); err != nil {
		o.t.Fatalf("%v: %s\n%s", err, out, o.logged())
	}
	o.redeemed(f)
	return f
}

// redeemed is what libvirt's swtpm and then QEMU's start do.
func (o *factory) redeemed(f *domain.Facts) {
	o.t.Helper()
	r, err := o.g.Redeem("swtpm", o.dir(f.UUID), &caller{pid: os.Getpid(), cgroup: ownCgroup(o.t)})
	if err != nil {
		o.t.Fatal(err)
	}
	r.Close()
	if err := o.g.Launched(f); err != nil {
		o.t.Fatal(err)
	}
}

// plain gives a VM's state in the clear.
func (o *factory) plain(uuid string) []byte {
	o.t.Helper()
	keys := testkit.Must[[]byte](o.t)(o.tpm.UnwrapKeys(background, o.g.peek().Get(uuid).WrappedKeys))
	return testkit.Must[[]byte](o.t)(statefile.Decrypt(o.read(uuid), keys[:32]))
}

// inside runs tpm2-tools in a shell on a copy of a VM's vTPM.
func (o *factory) inside(uuid, script string) []byte {
	o.t.Helper()
	testkit.Need(o.t, "tpm2_nvread")
	dir := o.t.TempDir()
	os.WriteFile(filepath.Join(dir, "tpm2-00.permall"), o.plain(uuid), 0o600)
	c := exec.Command("sh", "-c", `swtpm socket --tpm2 --tpmstate dir=. --server type=unixio,path=s --ctrl type=unixio,path=s.ctrl --flags not-need-init,startup-clear &
		export TPM2TOOLS_TCTI=swtpm:path=s
		until [ -S s.ctrl ]; do sleep 0.02; done
		( `+script+` ); r=$?; kill $!; wait; exit $r`)
	c.Dir = dir
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		o.t.Fatalf("%v: %s", err, errs.String())
	}
	return out
}

// openssl wants a chain to hold.
func opensslVerifies(t *testing.T, chain, der []byte) {
	t.Helper()
	dir := t.TempDir()
	ca, leaf := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "leaf.der")
	os.WriteFile(ca, chain, 0o600)
	os.WriteFile(leaf, der, 0o600)
	if out, err := exec.Command(testkit.Need(t, "openssl"), "verify", "-x509_strict", "-policy_check", "-CAfile", ca, leaf).CombinedOutput(); err != nil {
		t.Errorf("openssl verify: %v: %s", err, out)
	}
}

// The certificate handles of EK Credential Profile 2.3, 2.2.1.4, and of the
// platform's, in swtpm.
const nvCertificates = `for i in 0x01c00002 0x01c00016 0x01c08000; do tpm2_nvread $i > nv || exit 1; wc -c < nv; cat nv; done`

// A new VM's vTPM gets its certificates by swtpm_setup's own way, into its NV
// memory and into its record, and its AK.
func TestManufacture(t *testing.T) {
	t.Parallel()
	o := openFactory(t, func(c *config.Config) { c.Attestation.VTPMAK = true })
	f := o.manufactured(uuidA)
	r := o.g.peek().Get(uuidA)
	said, err := profile.UntrustedParse(r.EKCertificate)
	if err != nil || said.VM != uuidA || said.Origin != profile.Manufactured || said.KeyID != r.EKDigest.String() {
		t.Fatalf("%+v, %v; EK %s\n%s", said, err, r.EKDigest, o.logged())
	}
	chain := profile.EncodeChain(testkit.Must[[]*x509.Certificate](t)(o.g.certifierChain(background)))
	nv := o.inside(uuidA, nvCertificates)
	for _, kind := range []string{"RSA EK", "ECC EK", "platform"} {
		line, rest, _ := bytes.Cut(nv, []byte("\n"))
		n, ok := new(big.Int).SetString(strings.TrimSpace(string(line)), 10)
		if !ok || int(n.Int64()) > len(rest) {
			t.Fatalf("NV memory: %q", nv)
		}
		der := rest[:n.Int64()]
		nv = rest[n.Int64():]
		opensslVerifies(t, chain, der)
		if s, err := profile.UntrustedParse(der); err != nil || s.VM != uuidA || (s.Kind == profile.Platform) != (kind == "platform") {
			t.Errorf("%s: %+v, %v", kind, s, err)
		}
		if (kind == "RSA EK") != bytes.Equal(der, r.EKCertificate) {
			t.Errorf("%s: the record's certificate is another", kind)
		}
	}
	// The admin's other settings count: only SHA-384 is active.
	if out := o.inside(uuidA, `tpm2_getcap pcrs`); !strings.Contains(string(out), "sha384: [ 0,") || strings.Contains(string(out), "sha256: [ 0,") {
		t.Errorf("%s", out)
	}

	// The AK is there, is certified, and stays when the owner's hierarchy is cleared.
	key, err := ek.ParseAK(r.AKPublic)
	if err != nil {
		t.Fatal(err, o.logged())
	}
	opensslVerifies(t, chain, r.AKCertificate)
	if s, err := profile.UntrustedParse(r.AKCertificate); err != nil || s.Kind != profile.AK || s.VM != uuidA || !key.Equal(s.Key) {
		t.Errorf("%+v, %v", s, err)
	}
	public := o.inside(uuidA, `tpm2_clear >&2 && tpm2_readpublic -Q -c 0x8180ff01 -f tpmt -o ak && cat ak`)
	if !bytes.Equal(public, r.AKPublic) {
		t.Errorf("the AK in the vTPM is %x, in the record %x", public, r.AKPublic)
	}

	// It starts again, and again, with what it has.
	o.stop(f)
	for range 2 {
		if err := o.g.Prepare(background, f, ownCgroup(t), nil); err != nil {
			t.Fatal(err)
		}
		o.redeemed(f)
		o.stop(f)
	}
	if again := o.g.peek().Get(uuidA); !bytes.Equal(again.EKCertificate, r.EKCertificate) || !bytes.Equal(again.AKPublic, r.AKPublic) {
		t.Error("record changed")
	}
	var der []byte
	if err := o.call(bus.VMPath(uuidA), "org.freedesktop.DBus.Properties.Get", bus.VMInterface, "EKCertificate").Store(&der); err != nil || !bytes.Equal(der, r.EKCertificate) {
		t.Errorf("on D-Bus: %x, %v", der, err)
	}
}

// A vTPM whose AK cannot be made starts without, says so, and gets it at a later
// start: not at one from a saved image, which brings another state.
func TestNoAK(t *testing.T) {
	t.Parallel()
	o := openFactory(t, func(c *config.Config) { c.Attestation.VTPMAK = true })
	f := o.vm(uuidA, false)
	if err := o.g.Prepare(background, f, ownCgroup(t), nil); err != nil {
		t.Fatal(err)
	}
	if out, err := o.setup(f); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	before := o.read(uuidA)
	dir := o.g.launch.ek.Dir
	o.g.launch.ek.Dir = filepath.Join(dir, "none")
	r, err := o.g.Redeem("swtpm", o.dir(uuidA), &caller{pid: os.Getpid(), cgroup: ownCgroup(t)})
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	o.g.launch.ek.Dir = dir
	if err := o.g.Launched(f); err != nil {
		t.Fatal(err)
	}
	rec := o.g.peek().Get(uuidA)
	if len(rec.AKPublic) != 0 || len(rec.AKCertificate) != 0 || len(rec.EKCertificate) == 0 || !bytes.Equal(before, o.read(uuidA)) || !strings.Contains(o.logged(), "the new vTPM has no AK") {
		t.Errorf("AK %x\n%s", rec.AKPublic, o.logged())
	}
	o.stop(f)

	again := func() *list.Record {
		t.Helper()
		if err := o.g.Prepare(background, f, ownCgroup(t), nil); err != nil {
			t.Fatal(err)
		}
		o.redeemed(f)
		o.stop(f)
		return o.g.peek().Get(uuidA)
	}
	o.g.Restoring(f)
	if rec := again(); len(rec.AKPublic) != 0 {
		t.Error("a vTPM that a saved image brings got an AK")
	}
	o.g.cfg.Attestation.VTPMAK = false
	if rec := again(); len(rec.AKPublic) != 0 || !rec.AKDue {
		t.Error("an AK that is not wanted any more")
	}
	o.g.cfg.Attestation.VTPMAK = true
	if err := o.g.Prepare(background, f, ownCgroup(t), nil); err != nil {
		t.Fatal(err)
	}
	o.g.closeGrant(uuidA) // libvirt goes no further
	o.stop(f)
	with := o.read(uuidA)
	certificate := rec.EKCertificate
	o.g.cfg.Attestation.EKCertificates = false // an AK has one all the same
	if rec = again(); !bytes.Equal(rec.EKCertificate, certificate) || rec.AKDue {
		t.Errorf("AK due: %v\n%s", rec.AKDue, o.logged())
	}
	if bytes.Equal(with, before) {
		t.Error("no AK was made up")
	}
	public := o.inside(uuidA, `tpm2_readpublic -Q -c 0x8180ff01 -f tpmt -o ak && cat ak`)
	if !bytes.Equal(public, rec.AKPublic) {
		t.Errorf("the AK in the vTPM is %x, in the record %x\n%s", public, rec.AKPublic, o.logged())
	}
	key, err := ek.ParseAK(rec.AKPublic)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := profile.UntrustedParse(rec.AKCertificate); err != nil || s.Kind != profile.AK || s.VM != uuidA || !key.Equal(s.Key) {
		t.Errorf("%+v, %v", s, err)
	}
	settled := o.read(uuidA)
	if rec := again(); !bytes.Equal(settled, o.read(uuidA)) || !bytes.Equal(rec.AKPublic, public) {
		t.Error("it is made again")
	}
}

// A vTPM that was there before gets no AK, nor does one while that is not wanted.
func TestAdoptedGetsNoAK(t *testing.T) {
	t.Parallel()
	o := openFactory(t, func(c *config.Config) { c.Attestation.VTPMAK = true })
	f := o.vm(uuidA, true)
	for range 2 {
		if err := o.g.Prepare(background, f, ownCgroup(t), nil); err != nil {
			t.Fatal(err)
		}
		o.redeemed(f)
		o.stop(f)
	}
	if r := o.g.peek().Get(uuidA); r.AKDue || len(r.AKPublic) != 0 {
		t.Errorf("%+v", r)
	}
}

// Where certificates are turned off, swtpm_setup has the admin's own tool.
func TestAdminsTool(t *testing.T) {
	t.Parallel()
	o := openFactory(t, func(c *config.Config) { c.Attestation.EKCertificates = false })
	f := o.vm(uuidA, false)
	if err := o.g.Prepare(background, f, ownCgroup(t), nil); err != nil {
		t.Fatal(err)
	}
	if out, err := o.setup(f); err == nil || !strings.Contains(out, "/bin/false") {
		t.Errorf("%v: %s", err, out)
	}
}

// A TPM that does not sign: swtpm_setup ends with the reason, and leaves no
// state behind; when it signs again the VM starts.
func TestTPMDoesNotSign(t *testing.T) {
	t.Parallel()
	o := openFactory(t)
	f := o.vm(uuidA, false)
	if err := o.g.Prepare(background, f, ownCgroup(t), nil); err != nil {
		t.Fatal(err)
	}
	o.tpm.say(hosttpm.ErrBusy)
	out, err := o.setup(f)
	o.tpm.say(nil)
	if err == nil || !strings.Contains(out, "virt-trust: refused: tpm-busy: ") {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := os.Stat(o.state(uuidA)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("state is left: %v", err)
	}
	if !slices.ContainsFunc(o.g.journal.recent(10), func(d Decision) bool { return d.Reason == reason.TPMBusy && d.Operation == "certify" }) {
		t.Errorf("virt-trust log does not say it: %+v", o.g.journal.recent(10))
	}
	o.stop(f)
	os.RemoveAll(filepath.Dir(o.dir(uuidA))) // as libvirt does
	if err := o.g.Prepare(background, f, ownCgroup(t), nil); err != nil {
		t.Fatal(err)
	}
	if out, err := o.setup(f); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	o.redeemed(f)
	if len(o.g.peek().Get(uuidA).EKCertificate) == 0 {
		t.Error("no certificate")
	}
}

var libtpms = profile.TPM{Manufacturer: "id:00001014", Version: "id:20191023", Family: "2.0", Revision: 164}

func rsaKey(t *testing.T) []byte {
	t.Helper()
	k := testkit.Must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048))
	return testkit.Must[[]byte](t)(x509.MarshalPKIXPublicKey(k.Public()))
}

func eccKey(t *testing.T) []byte {
	t.Helper()
	k := testkit.Must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	return testkit.Must[[]byte](t)(x509.MarshalPKIXPublicKey(k.Public()))
}

// process is a swtpm_setup that runs as long as the test.
func process(t *testing.T) int {
	t.Helper()
	c := exec.Command("sleep", "60")
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Process.Kill(); c.Wait() })
	return c.Process.Pid
}

func TestCertifyRefusals(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	a, b := process(t), process(t)
	certify := func(kind profile.Kind, key []byte, vm string, parent int) error {
		_, err := h.g.CertifyEK(background, kind, key, vm, libtpms, &caller{parent: parent, cgroup: cgroup})
		return err
	}
	no := func(err error, part string) {
		t.Helper()
		if r := refuses(t, err, reason.PolicyForbids); !strings.Contains(r.What, part) {
			t.Errorf("%s: it lacks %q", r, part)
		}
	}
	key, other := rsaKey(t), rsaKey(t)
	no(certify("ek", key, uuidA, a), "under a launch grant") // no start is under way

	for id, pid := range map[string]int{uuidA: a, uuidB: b} {
		f := h.vm(id, false)
		if err := h.prepare(f); err != nil {
			t.Fatal(err)
		}
		no(certify("ek", key, id, pid), "under a launch grant") // nobody redeemed as swtpm_setup
		h.mkdir(id)
		r, err := h.g.Redeem("swtpm_setup", h.dir(id), &caller{pid: pid, cgroup: cgroup})
		if err != nil || !r.Certify {
			t.Fatal(r, err)
		}
		r.Close()
	}
	no(certify("ek", key, uuidA, os.Getpid()), "under a launch grant") // not its child
	no(certify("ek", key, uuidB, a), "and the grant for")
	no(certify("ak", key, uuidA, a), "no certificate of the kind")
	no(certify("ek", []byte("key"), uuidA, a), "cannot be read")
	no(certify("ek", make([]byte, 5000), uuidA, a), "cannot be read")
	no(certify("platform", key, uuidA, a), "not over the vTPM's endorsement key")
	_, err := h.g.CertifyEK(background, "ek", key, uuidA, libtpms, &caller{parent: a, cgroup: "0::/user.slice\n"})
	no(err, "not called by libvirt's")

	h.tpm.say(hosttpm.ErrBusy)
	refuses(t, certify("ek", key, uuidA, a), reason.TPMBusy)
	h.tpm.say(nil)
	if err := certify("ek", key, uuidA, a); err != nil { // which it was not refused for good
		t.Fatal(err)
	}
	no(certify("ek", key, uuidA, a), "already")
	no(certify("ek", other, uuidA, a), "already")
	no(certify("ek", key, uuidB, b), "is that of the VM "+uuidA)
	if err := errors.Join(certify("platform", key, uuidA, a), certify("ek", eccKey(t), uuidA, a)); err != nil {
		t.Fatal(err)
	}
	no(certify("platform", key, uuidA, a), "already")

	// A key that the list knows.
	r := h.g.peek().Get(uuidA).Clone()
	r.EKDigest = list.DigestOf(other)
	if err := h.g.peek().Commit(liststore.Change{Put: r}); err != nil {
		t.Fatal(err)
	}
	no(certify("ek", other, uuidB, b), "is that of the VM "+uuidA)

	h.later(time.Duration(h.g.cfg.Grant.Lifetime) + time.Second)
	no(certify("ek", rsaKey(t), uuidB, b), "expired")
}

// What is not a new vTPM gets nothing.
func TestCertifyOldVTPM(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f, _, _ := h.ran(uuidA)
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	pid := process(t)
	r, err := h.g.Redeem("swtpm_setup", h.dir(uuidA), &caller{pid: pid, cgroup: cgroup})
	if err != nil || r.Certify {
		t.Fatal(r, err)
	}
	r.Close()
	_, err = h.g.CertifyEK(background, "ek", rsaKey(t), uuidA, libtpms, &caller{parent: pid, cgroup: cgroup})
	refuses(t, err, reason.PolicyForbids)
}

// The certificate of an EK that the vTPM turns out not to have is not kept.
func TestOtherEKThanCertified(t *testing.T) {
	t.Parallel()
	o := openFactory(t)
	f := o.vm(uuidA, false)
	if err := o.g.Prepare(background, f, ownCgroup(t), nil); err != nil {
		t.Fatal(err)
	}
	if out, err := o.setup(f); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	gr := o.g.grants[o.dir(uuidA)]
	gr.made.key = list.DigestOf([]byte("another"))
	o.redeemed(f)
	if r := o.g.peek().Get(uuidA); len(r.EKCertificate) != 0 || r.EKDigest.IsZero() || !strings.Contains(o.logged(), "its certificate is not kept") {
		t.Errorf("%x\n%s", r.EKCertificate, o.logged())
	}
}

// Who may ask, as the bus tells.
func TestCertifyCallers(t *testing.T) {
	t.Parallel()
	o := openFactory(t)
	me := uint32(os.Getuid())
	// a{sv} is all that callBus ends with; the key's text is not one, and comes second to who asks.
	for _, program := range []string{"other", "wrapper", "hook"} {
		if out := o.as(me, "certify", program, o.address); !strings.Contains(out, "policy-forbids") || !strings.Contains(out, "certificates are for virt-trust-ekcert") {
			t.Errorf("%s: %s", program, out)
		}
	}
	if out := o.as(me, "certify", "ekcert", o.address); !strings.Contains(out, "under a launch grant") {
		t.Errorf("without a grant: %s", out)
	}
	if me == 0 {
		if out := o.as(65534, "certify", "ekcert", o.address); !strings.Contains(out, "certificates are for virt-trust-ekcert") {
			t.Errorf("another user: %s", out)
		}
		o.s.agent = func() (uint32, error) { return 1, nil }
		if out := o.as(65534, "chain", "other", o.address); !strings.Contains(out, bus.ErrorAccessDenied) {
			t.Errorf("another user brings a chain: %s", out)
		}
		if out := o.as(1, "chain", "other", o.address); !strings.Contains(out, "policy-forbids") { // not a chain
			t.Errorf("the agent: %s", out)
		}
	}
}

// callCertify asks for a certificate, or brings a chain.
func callCertify(mode, address string) {
	conn, err := dbus.Connect(address)
	if err == nil {
		if mode == "certify" {
			k, _ := rsa.GenerateKey(rand.Reader, 2048)
			spki, _ := x509.MarshalPKIXPublicKey(k.Public())
			err = conn.Object(bus.Name, bus.Path).Call(bus.ManagerInterface+".CertifyEK", 0, "ek", spki, dict{}).Err
		} else {
			err = conn.Object(bus.Name, bus.HostPath).Call(bus.AttestationInterface+".SetCertifierCertificate", 0, []byte("chain"), dict{}).Err
		}
	}
	var e dbus.Error
	errors.As(err, &e)
	os.Stdout.WriteString(e.Name + " " + reason.OneLine(err.Error()))
	os.Exit(0)
}

// authority is a CA, and gives chains for the certifier by it.
func (h *house) authority() (ca *x509.Certificate, issue func(change func(*x509.Certificate)) []byte) {
	t := h.t
	t.Helper()
	root := testkit.Must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	now := h.g.now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	template.Subject.CommonName = "CA"
	rootDER := testkit.Must[[]byte](t)(x509.CreateCertificate(rand.Reader, template, template, root.Public(), root))
	ca = testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(rootDER))
	return ca, func(change func(*x509.Certificate)) []byte {
		c := testkit.Must[*x509.Certificate](t)(profile.IssuerTemplate(h.tpm.CertifierPublic()))
		c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(2), now.Add(-time.Minute), now.Add(time.Minute)
		change(c)
		der := testkit.Must[[]byte](t)(x509.CreateCertificate(rand.Reader, c, ca, h.tpm.CertifierPublic(), root))
		return profile.EncodeChain([]*x509.Certificate{testkit.Must[*x509.Certificate](t)(x509.ParseCertificate(der)), ca})
	}
}

// A CA's certificate takes the place of the certifier's own, and holds for what
// was issued before.
func TestCertifierChain(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	f := h.vm(uuidA, false)
	if err := h.prepare(f); err != nil {
		t.Fatal(err)
	}
	pid := process(t)
	h.mkdir(uuidA)
	testkit.Must[*Redemption](t)(h.g.Redeem("swtpm_setup", h.dir(uuidA), &caller{pid: pid, cgroup: cgroup}))
	der := testkit.Must[[]byte](t)(h.g.CertifyEK(background, "ek", rsaKey(t), uuidA, libtpms, &caller{parent: pid, cgroup: cgroup}))
	own := testkit.Must[[]*x509.Certificate](t)(h.g.certifierChain(background))
	opensslVerifies(t, profile.EncodeChain(own), der)
	if again := testkit.Must[[]*x509.Certificate](t)(h.g.certifierChain(background)); !again[0].Equal(own[0]) {
		t.Error("made anew")
	}

	ca, issue := h.authority()
	refuses(t, h.g.SetCertifierChain(background, issue(func(c *x509.Certificate) { c.Subject.CommonName = "me" })), reason.PolicyForbids)
	good := issue(func(*x509.Certificate) {})
	if err := h.g.SetCertifierChain(background, good); err != nil {
		t.Fatal(err)
	}
	if h.g.chainText() != string(good) {
		t.Error("another chain is kept")
	}
	opensslVerifies(t, profile.EncodeChain([]*x509.Certificate{ca, testkit.Must[[]*x509.Certificate](t)(h.g.certifierChain(background))[0]}), der)

	// It outlives virt-trustd; when it has expired, or the file is none, the certifier's own comes back.
	h.g.certifier.chain = nil
	if c := testkit.Must[[]*x509.Certificate](t)(h.g.certifierChain(background)); len(c) != 2 {
		t.Errorf("%d certificates", len(c))
	}
	h.later(2 * time.Minute)
	if c := testkit.Must[[]*x509.Certificate](t)(h.g.certifierChain(background)); len(c) != 1 {
		t.Errorf("%d certificates", len(c))
	}
	os.WriteFile(h.g.chainPath(), []byte("rubbish"), 0o600)
	h.g.certifier.chain = nil
	if c := testkit.Must[[]*x509.Certificate](t)(h.g.certifierChain(background)); len(c) != 1 {
		t.Errorf("%d certificates", len(c))
	}
}

// The chain on D-Bus is that of the moment, however lately the TPM was asked.
func TestCertifierChainIsShown(t *testing.T) {
	t.Parallel()
	o := openOffice(t)
	_, issue := o.authority()
	for i := range 2 {
		good := issue(func(c *x509.Certificate) { c.SerialNumber = big.NewInt(int64(10 + i)) })
		if err := o.g.SetCertifierChain(background, good); err != nil {
			t.Fatal(err)
		}
		var shown string
		if err := o.call(bus.HostPath, "org.freedesktop.DBus.Properties.Get", bus.HostInterface, "CertifierChain").Store(&shown); err != nil || shown != string(good) {
			t.Errorf("chain %d: %v, %d bytes of %d", i, err, len(shown), len(good))
		}
	}
}

// While the TPM signs the certifier's own certificate, whoever needs no TPM goes
// on; and what a CA brings meanwhile stays.
func TestCertifierWaitsForTheTPMAlone(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.tpm.mu.Lock()
	h.tpm.held = make(chan struct{})
	h.tpm.mu.Unlock()
	signed := make(chan []*x509.Certificate, 1)
	go func() { signed <- testkit.Must[[]*x509.Certificate](t)(h.g.certifierChain(background)) }()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		h.tpm.mu.Lock()
		asking := h.tpm.asking
		h.tpm.mu.Unlock()
		if asking > 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the TPM is not asked")
		}
	}
	_, issue := h.authority()
	good := issue(func(*x509.Certificate) {})
	set := make(chan error, 1)
	go func() {
		h.g.chainText()
		set <- h.g.SetCertifierChain(background, good)
	}()
	select {
	case err := <-set:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the chain waits for the TPM")
	}
	close(h.tpm.held)
	if chain := <-signed; len(chain) != 2 || h.g.chainText() != string(good) {
		t.Errorf("%d certificates", len(chain))
	}
}

// A VM that was adopted has no certificate until an admin has one made; a copy
// of its vTPM is told, and gets none.
func TestAdoptedAndCopied(t *testing.T) {
	t.Parallel()
	o := openFactory(t)
	for _, id := range []string{uuidA, uuidB} { // both with the same plain state
		f := o.vm(id, true)
		if err := o.g.Prepare(background, f, ownCgroup(t), nil); err != nil {
			t.Fatal(err)
		}
		o.redeemed(f)
		o.stop(f)
		if id != uuidA {
			break
		}
		r := o.g.peek().Get(id)
		if r.EKDigest.IsZero() || len(r.EKCertificate) != 0 || len(sharers(o.g.peek(), r)) != 0 {
			t.Fatalf("%+v", r)
		}
		what, err := o.g.IssueEK(background, off(f), f)
		if err != nil {
			t.Fatal(err)
		}
		r = o.g.peek().Get(id)
		said, err := profile.UntrustedParse(r.EKCertificate)
		if err != nil || said.Origin != profile.TakenIn || said.VM != id || said.KeyID != r.EKDigest.String() || !strings.Contains(what, "not in the vTPM") {
			t.Errorf("%+v, %v, %q", said, err, what)
		}
		opensslVerifies(t, profile.EncodeChain(testkit.Must[[]*x509.Certificate](t)(o.g.certifierChain(background))), r.EKCertificate)
		if what, err = o.g.IssueEK(background, off(f), f); err != nil || !strings.Contains(what, "already") {
			t.Errorf("again: %q, %v", what, err)
		}
	}
	r := o.g.peek().Get(uuidB)
	if got := sharers(o.g.peek(), r); !slices.Equal(got, []string{uuidA}) || !strings.Contains(o.logged(), "same endorsement key") {
		t.Errorf("%q\n%s", got, o.logged())
	}
	var shared []string
	if err := o.call(bus.VMPath(uuidA), "org.freedesktop.DBus.Properties.Get", bus.VMInterface, "EKSharedWith").Store(&shared); err != nil || !slices.Equal(shared, []string{uuidB}) {
		t.Errorf("on D-Bus: %q, %v", shared, err)
	}
	f := o.facts(uuidB)
	if what, err := o.g.Check(background, f); err != nil || !strings.Contains(what, "same endorsement key as that of vm-a") {
		t.Errorf("check: %q, %v", what, err)
	}
	_, err := o.g.IssueEK(background, off(f), f)
	if r := refuses(t, err, reason.PolicyForbids); !strings.Contains(r.What, "same endorsement key") {
		t.Errorf("%s", r)
	}
	_, err = o.g.IssueEK(context.Background(), off(o.facts(uuidA)), func() *domain.Facts { f := o.facts(uuidA); f.UUID = "cccccccc-0000-4000-8000-000000000003"; return f }())
	refuses(t, err, reason.VTPMUnknown)
}

// BenchmarkManufacture is a whole swtpm_setup through the wrapper, with
// certificates by virt-trust-ekcert, by swtpm_localca, and by virt-trust-ekcert
// with the AK besides (which is made when swtpm's grant is redeemed). The host's
// TPM is a fake here: add what three signatures take.
func BenchmarkManufacture(b *testing.B) {
	localca := testkit.Need(b, "swtpm_localca")
	for _, by := range []string{"virt-trust-ekcert", "swtpm_localca", "virt-trust-ekcert and AK"} {
		b.Run(by, func(b *testing.B) {
			o := openFactory(b, func(c *config.Config) {
				c.Attestation.EKCertificates, c.Attestation.VTPMAK = by != "swtpm_localca", strings.HasSuffix(by, "AK")
			})
			ca := b.TempDir()
			os.WriteFile(o.conf, []byte("create_certs_tool = "+localca+"\ncreate_certs_tool_config = "+ca+"/conf\ncreate_certs_tool_options = /etc/swtpm-localca.options\n"), 0o644)
			os.WriteFile(filepath.Join(ca, "conf"), []byte("statedir = "+ca+"\nsigningkey = "+ca+"/signkey.pem\nissuercert = "+ca+"/issuercert.pem\ncertserial = "+ca+"/certserial\n"), 0o644)
			o.manufactured(uuidB) // makes the CA
			b.ResetTimer()
			o.cpu = 0
			for range b.N {
				b.StopTimer()
				f := o.vm(uuidA, false)
				if err := o.g.Prepare(background, f, ownCgroup(b), nil); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				if out, err := o.setup(f); err != nil {
					b.Fatalf("%v: %s", err, out)
				}
				o.redeemed(f)
				b.StopTimer()
				o.stop(f)
				os.RemoveAll(filepath.Dir(o.dir(uuidA)))
				if err := o.g.delete(background, o.g.peek(), o.g.peek().Get(uuidA), "the end"); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(o.cpu.Seconds()*1000/float64(b.N), "cpu-ms/op") // of swtpm_setup alone; no load adds to it
		})
	}
}
