package daemon

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"virt-trust/internal/domain"
	"virt-trust/internal/domain/libvirt"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/hosttpm/policy"
	"virt-trust/internal/launcher/measure"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/testkit"
	"virt-trust/internal/vtpm/lifecycle"
	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/liststore"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statedir"
	"virt-trust/internal/vtpm/statefile"
)

// childMode names, in the environment, what this test binary does instead of
// running tests.
const childMode = "VIRT_TRUST_TEST_CHILD"

func init() {
	if os.Getenv(childMode) != "" {
		runtime.LockOSThread() // strace counts system calls for each thread
	}
}

func TestMain(m *testing.M) {
	switch mode := os.Getenv(childMode); mode {
	case "":
	case "hold":
		holdLock(os.Args[1])
	case "call":
		callBus(os.Args[1], os.Args[2], os.Args[3:])
	case "attest":
		callAttest(os.Args[1], os.Args[2], len(os.Args[3]))
	case "certify", "chain":
		callCertify(mode, os.Args[1])
	case "manufacture":
		os.Exit(manufactureInChild())
	case "count":
		os.Exit(countOn(os.Args[1]))
	case "libvirtd":
		startHook(os.Args[1:])
	default:
		os.Exit(carryOutInChild(mode, os.Args[1]))
	}
	code := m.Run()
	if made.dir != "" {
		os.RemoveAll(made.dir)
	}
	os.Exit(code)
}

// holdLock locks a file as swtpm does, says so, and waits to be killed.
func holdLock(path string) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	}
	fmt.Println(err)
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// made is what takes long to make and is the same for all tests: a vTPM's
// plain state, a qcow2 image, a fake TPM.
var made struct {
	once sync.Once
	err  error
	dir  string
}

func makings(t testing.TB) string {
	t.Helper()
	testkit.Need(t, "swtpm")
	setup, qemuImg := testkit.Need(t, "swtpm_setup"), testkit.Need(t, "qemu-img")
	made.once.Do(func() {
		if made.dir, made.err = os.MkdirTemp("", "daemon"); made.err != nil {
			return
		}
		state := filepath.Join(made.dir, "tpm2")
		os.Mkdir(state, 0o700)
		for _, c := range []*exec.Cmd{
			exec.Command(setup, "--tpm2", "--tpm-state", state, "--not-overwrite"),
			exec.Command(qemuImg, "create", "-q", "-f", "qcow2", filepath.Join(made.dir, "disk.qcow2"), "1M"),
		} {
			c.SysProcAttr, c.WaitDelay = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}, time.Second
			if out, err := c.CombinedOutput(); err != nil {
				made.err = errors.Join(made.err, fmt.Errorf("%s: %w: %s", c, err, out))
			}
		}
		made.err = errors.Join(made.err, newFakeTPM().save(filepath.Join(made.dir, "tpm.json")))
	})
	if made.err != nil {
		t.Fatal(made.err)
	}
	return made.dir
}

// fakeTPM is a TPM in software that says what a test wants.
type fakeTPM struct {
	Bind, Sig, List []byte // PKCS #8, PKCS #8, list key
	Policy          []byte // policy key's private half

	bind *rsa.PrivateKey
	sig  *ecdsa.PrivateKey
	nv   string // the file of the counter: it outlives a process

	mu      sync.Mutex
	err     error // of everything that asks the TPM
	delay   time.Duration
	held    chan struct{} // not nil: it answers when this is closed
	asking  int           // who waits for an answer
	unwraps int
	pcr     hosttpm.PCR // the launch PCR; zero: as after a reset
	extends int
}

func newFakeTPM() *fakeTPM {
	b, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	s, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	f := &fakeTPM{List: make([]byte, 32)}
	rand.Read(f.List)
	f.Policy = make([]byte, 32)
	rand.Read(f.Policy)
	f.Bind, _ = x509.MarshalPKCS8PrivateKey(b)
	f.Sig, _ = x509.MarshalPKCS8PrivateKey(s)
	return f
}

func (f *fakeTPM) save(path string) error {
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

func loadFakeTPM(path string) (*fakeTPM, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	f := &fakeTPM{nv: path + ".counter"}
	return f, f.parse(b)
}

func (f *fakeTPM) parse(b []byte) error {
	if err := json.Unmarshal(b, f); err != nil {
		return err
	}
	k, err := x509.ParsePKCS8PrivateKey(f.Bind)
	if err != nil {
		return err
	}
	f.bind = k.(*rsa.PrivateKey)
	if k, err = x509.ParsePKCS8PrivateKey(f.Sig); err != nil {
		return err
	}
	f.sig = k.(*ecdsa.PrivateKey)
	return nil
}

func (f *fakeTPM) say(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func (f *fakeTPM) ask(ctx context.Context) error {
	f.mu.Lock()
	err, delay, held := f.err, f.delay, f.held
	f.asking++
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.asking--
	}()
	if held != nil {
		<-held
	}
	select {
	case <-time.After(delay):
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", hosttpm.ErrBusy, ctx.Err())
	}
	return err
}

func (f *fakeTPM) Provision(ctx context.Context) error { return f.ask(ctx) }

func (f *fakeTPM) Status(ctx context.Context) (hosttpm.Status, error) {
	err := f.ask(ctx)
	switch {
	case err == nil:
		return hosttpm.Status{State: hosttpm.Ready}, nil
	case errors.Is(err, hosttpm.ErrPolicy):
		return hosttpm.Status{State: hosttpm.NotApproved, Differing: []uint{7}}, nil
	case errors.Is(err, hosttpm.ErrCleared):
		return hosttpm.Status{State: hosttpm.Cleared}, nil
	}
	return hosttpm.Status{}, err
}

func (f *fakeTPM) UnsealListKey(ctx context.Context) ([]byte, error) {
	return bytes.Clone(f.List), f.ask(ctx)
}

var oaepLabel = []byte("virt-trust/label/v1\x00")

func (f *fakeTPM) WrapKeys(b []byte) ([]byte, error) {
	return rsa.EncryptOAEP(sha256.New(), rand.Reader, &f.bind.PublicKey, b, oaepLabel)
}

func (f *fakeTPM) UnwrapKeys(ctx context.Context, c []byte) ([]byte, error) {
	f.mu.Lock()
	f.unwraps++
	f.mu.Unlock()
	if err := f.ask(ctx); err != nil {
		return nil, err
	}
	b, err := rsa.DecryptOAEP(sha256.New(), nil, f.bind, c, oaepLabel)
	if err != nil {
		return nil, hosttpm.ErrCiphertext
	}
	return b, nil
}

func (f *fakeTPM) BindKeyName() []byte {
	h := sha256.Sum256(f.bind.N.Bytes())
	return append([]byte{0, 11}, h[:]...)
}

func (f *fakeTPM) ReadPCR(ctx context.Context, index uint) (hosttpm.PCR, error) {
	if err := f.ask(ctx); err != nil {
		return hosttpm.PCR{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pcr.Values == nil {
		f.pcr.Values = map[string][]byte{"sha1": make([]byte, 20), "sha256": make([]byte, 32)}
	}
	return f.pcr, nil
}

func (f *fakeTPM) ExtendPCR(ctx context.Context, e hosttpm.Extension) error {
	now, err := f.ReadPCR(ctx, e.PCR)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pcr.Values = map[string][]byte{}
	for bank, v := range now.Values {
		h := sha1.New()
		if bank == "sha256" {
			h = sha256.New()
		}
		h.Write(v)
		h.Write(e.Digests[bank])
		f.pcr.Values[bank] = h.Sum(nil)
	}
	f.extends++
	return nil
}

// reset is what a boot does to the PCRs.
func (f *fakeTPM) reset() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pcr = hosttpm.PCR{ResetCount: f.pcr.ResetCount + 1}
}

func (f *fakeTPM) Sign(ctx context.Context, d [32]byte) ([]byte, error) {
	if err := f.ask(ctx); err != nil {
		return nil, err
	}
	return ecdsa.SignASN1(rand.Reader, f.sig, d[:])
}

func (f *fakeTPM) CertifierPublic() *ecdsa.PublicKey { return &f.sig.PublicKey }

func (f *fakeTPM) counter() (n uint64) {
	b, _ := os.ReadFile(f.nv)
	fmt.Sscan(string(b), &n)
	return n
}

func (f *fakeTPM) Counter(ctx context.Context) (uint64, error) { return f.counter(), f.ask(ctx) }

func (f *fakeTPM) FirstCount(ctx context.Context) (uint64, error) { return 1, f.ask(ctx) }

func (f *fakeTPM) Count(ctx context.Context, next uint64, urgent bool) (uint64, error) {
	if err := f.ask(ctx); err != nil {
		return 0, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.counter()
	if n < next {
		n++
	}
	// Whole or not at all, and for good: children are killed here too.
	return n, liststore.WriteFile(f.nv, fmt.Append(nil, n), 0o600)
}

func (f *fakeTPM) PolicyKeyName() []byte {
	h := sha256.Sum256(f.Policy)
	return append([]byte{0, 11}, h[:]...)
}

func (f *fakeTPM) WithSecrets(ctx context.Context, use func(listKey, policyKey []byte) error) error {
	if err := f.ask(ctx); err != nil {
		return err
	}
	return use(f.List, f.Policy)
}

func (f *fakeTPM) PCRs(ctx context.Context) (policy.State, error) { return policy.State{}, nil }

func (f *fakeTPM) ApproveWith(ctx context.Context, key []byte, note string, states ...policy.State) error {
	if !bytes.Equal(key, f.Policy) {
		return hosttpm.ErrFailed
	}
	f.say(nil)
	return nil
}

func (f *fakeTPM) Reprovision(ctx context.Context, listKey []byte) error {
	n := newFakeTPM()
	n.List = bytes.Clone(listKey)
	f.become(n)
	return nil
}

// become makes f another TPM.
func (f *fakeTPM) become(n *fakeTPM) {
	b, err := json.Marshal(n)
	if err == nil {
		err = f.parse(b)
	}
	if err != nil {
		panic(err)
	}
	os.Remove(f.nv)
	f.say(nil)
}

// house is a host: folders, a TPM, a Guard.
type house struct {
	t    testing.TB
	root string
	tpm  *fakeTPM
	g    *Guard
	now  time.Time // added to the clock
	mu   sync.Mutex
	log  bytes.Buffer
}

const (
	uuidA = "aaaaaaaa-0000-4000-8000-000000000001"
	uuidB = "bbbbbbbb-0000-4000-8000-000000000002"
)

func newHouse(t testing.TB) *house {
	t.Helper()
	from := makings(t)
	h := &house{t: t, root: folder(t)}
	for _, d := range []string{"swtpm", "state", "run", "images"} {
		if err := os.Mkdir(filepath.Join(h.root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	copyFile(t, filepath.Join(from, "tpm.json"), filepath.Join(h.root, "tpm.json"))
	h.boot()
	return h
}

// folder is a test's own, in memory where that is possible: what is synced
// there is synced at once. What a power cut leaves is tested elsewhere.
func folder(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "virt-trust")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// config is the same here and in a child.
func configIn(root string) config.Config {
	c := config.Default()
	c.Swtpm.StateRoot = filepath.Join(root, "swtpm")
	c.Launcher.Policy = []string{config.FirstUse} // dpkg takes its time; see launch_test.go
	if u, err := user.Current(); err == nil {
		c.Swtpm.User = u.Username
	}
	return c
}

func dirsIn(root string) Dirs {
	return Dirs{State: filepath.Join(root, "state"), Run: filepath.Join(root, "run")}
}

// boot starts a virt-trustd on what lies there.
func (h *house) boot(change ...func(*config.Config)) {
	h.t.Helper()
	var err error
	if h.tpm == nil {
		if h.tpm, err = loadFakeTPM(filepath.Join(h.root, "tpm.json")); err != nil {
			h.t.Fatal(err)
		}
	}
	c := configIn(h.root)
	for _, f := range change {
		f(&c)
	}
	l := logrus.New()
	l.Out = h
	l.Level = logrus.DebugLevel
	if h.g, err = NewGuard(c, dirsIn(h.root), h.tpm, logrus.NewEntry(l), func(string) {}); err != nil {
		h.t.Fatal(err)
	}
	g := h.g
	g.launch.measurer = measurer
	g.now = func() time.Time {
		h.mu.Lock()
		defer h.mu.Unlock()
		return time.Now().Add(h.now.Sub(time.Time{}))
	}
	h.t.Cleanup(func() { g.Close() })
}

// Write takes what is logged.
func (h *house) Write(b []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.log.Write(b)
}

func (h *house) logged() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.log.String()
}

func (h *house) later(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now = h.now.Add(d)
}

// reboot ends virt-trustd as kill -9 does, and starts another.
func (h *house) reboot(change ...func(*config.Config)) {
	h.t.Helper()
	h.g.Close()
	h.boot(change...)
}

func (h *house) dir(uuid string) string   { return filepath.Join(h.root, "swtpm", uuid, "tpm2") }
func (h *house) state(uuid string) string { return filepath.Join(h.dir(uuid), "tpm2-00.permall") }
func (h *house) image(uuid string) string { return filepath.Join(h.root, "images", uuid+".qcow2") }

// The emulator is this program, which nothing starts.
const domainXML = `<domain type='kvm'><name>%s</name><uuid>%s</uuid><devices><emulator>/proc/self/exe</emulator>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='%s'/><target dev='vda'/></disk>
<tpm model='tpm-crb'><backend type='emulator' version='2.0'>%s</backend></tpm></devices></domain>`

// measurer remembers digests for all tests.
var measurer = &measure.Measurer{}

func factsIn(root, uuid, inTPM string) *domain.Facts {
	name := "vm-" + uuid[:1]
	f, err := domain.Parse([]byte(fmt.Sprintf(domainXML, name, uuid, filepath.Join(root, "images", uuid+".qcow2"), inTPM)))
	if err != nil {
		panic(err)
	}
	return f
}

func (h *house) facts(uuid string) *domain.Facts { return factsIn(h.root, uuid, "") }

// vm gives a VM an image and, with plain, a vTPM as plain libvirt makes it.
func (h *house) vm(uuid string, plain bool) *domain.Facts {
	h.t.Helper()
	copyFile(h.t, filepath.Join(made.dir, "disk.qcow2"), h.image(uuid))
	if plain {
		h.manufacture(uuid)
	}
	return h.facts(uuid)
}

// manufacture puts a plain state into a VM's folder.
func (h *house) manufacture(uuid string) {
	h.t.Helper()
	h.mkdir(uuid)
	copyFile(h.t, filepath.Join(made.dir, "tpm2", "tpm2-00.permall"), h.state(uuid))
	os.WriteFile(filepath.Join(h.dir(uuid), ".lock"), nil, 0o600)
}

func (h *house) mkdir(uuid string) {
	h.t.Helper()
	if err := os.MkdirAll(h.dir(uuid), 0o700); err != nil {
		h.t.Fatal(err)
	}
}

func plainState(t testing.TB) []byte {
	t.Helper()
	return testkit.Must[[]byte](t)(os.ReadFile(filepath.Join(makings(t), "tpm2", "tpm2-00.permall")))
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

const cgroup = "0::/system.slice/libvirtd.service\n"

func libvirts() *caller { return &caller{pid: os.Getpid(), cgroup: cgroup} }

// keys redeems a grant as swtpm.
func (h *house) keys(uuid string) (state, transfer []byte) {
	h.t.Helper()
	r, err := h.g.Redeem("swtpm", h.dir(uuid), libvirts())
	if err != nil {
		h.t.Fatal(err)
	}
	defer r.Close()
	if r.State == nil {
		return nil, nil
	}
	read := func(f *os.File) []byte {
		b := testkit.Must[[]byte](h.t)(io.ReadAll(f))
		return testkit.Must[[]byte](h.t)(hex.DecodeString(string(b)))
	}
	return read(r.State), read(r.Transfer)
}

// write writes a state as swtpm does. Each has other bytes and the same content.
func (h *house) write(uuid string, key []byte) {
	h.t.Helper()
	iv := make([]byte, 32)
	rand.Read(iv)
	h.put(uuid, testkit.Must[[]byte](h.t)(statefile.Encrypt(plainState(h.t), key, iv)))
}

func (h *house) put(uuid string, b []byte) {
	h.t.Helper()
	tmp := filepath.Join(h.dir(uuid), "TMP2-00.permall")
	if err := errors.Join(os.WriteFile(tmp, b, 0o600), os.Rename(tmp, h.state(uuid))); err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) read(uuid string) []byte {
	h.t.Helper()
	return testkit.Must[[]byte](h.t)(os.ReadFile(h.state(uuid)))
}

// noted waits until what lies there is kept and in the journal.
func (h *house) noted(uuid string) {
	h.t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		dir, err := statedir.Look(h.dir(uuid))
		if err == nil && h.newest(uuid) == dir.Digest && h.g.keptDigest(uuid, dir.Name) == dir.Digest {
			return
		}
	}
	h.t.Fatalf("the state is not noted; log:\n%s", h.logged())
}

// newest is the newest state that a running VM is known to have.
func (h *house) newest(uuid string) list.Digest {
	h.g.mu.Lock()
	s := h.g.sessions[uuid]
	h.g.mu.Unlock()
	r := h.g.peek().Get(uuid)
	if s == nil {
		return r.Baseline
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return lifecycle.Newest(r, s.noted)
}

// start does what libvirt does until the VM runs, and gives its keys.
func (h *house) start(f *domain.Facts) (state []byte) {
	h.t.Helper()
	if err := h.g.Prepare(context.Background(), f, cgroup, nil); err != nil {
		h.t.Fatal(err)
	}
	h.mkdir(f.UUID)
	state, _ = h.keys(f.UUID)
	if err := h.g.Launched(f); err != nil {
		h.t.Fatal(err)
	}
	return state
}

func (h *house) stop(f *domain.Facts) {
	h.t.Helper()
	if err := h.g.Stopped(context.Background(), f, false); err != nil {
		h.t.Fatal(err)
	}
}

// ran makes a VM that has run several times: its state's versions, oldest first.
func (h *house) ran(uuid string) (f *domain.Facts, key []byte, versions [][]byte) {
	h.t.Helper()
	f = h.vm(uuid, true)
	for range 3 {
		key = h.start(f)
		h.write(uuid, key)
		h.noted(uuid)
		h.stop(f)
		versions = append(versions, h.read(uuid))
	}
	return f, key, versions
}

func (h *house) prepare(f *domain.Facts) error {
	return h.g.Prepare(context.Background(), f, cgroup, nil)
}

// refuses wants a refusal with this code and a way back.
func refuses(t testing.TB, err error, code reason.Code) *reason.Refusal {
	t.Helper()
	r := reason.As(err)
	if r == nil || r.Code != code {
		t.Fatalf("%v, want %s", err, code)
	}
	if r.Mend == "" || strings.ContainsAny(r.Error(), "\n\x1b") {
		t.Errorf("%q has no way back or is no line", r.Error())
	}
	return r
}

// tree is every file below a house's root that a refusal must leave as it is.
func (h *house) tree() map[string]string {
	h.t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(h.root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() == "decisions.jsonl" {
			return err
		}
		b, err := os.ReadFile(p)
		st, _ := d.Info()
		all[p] = fmt.Sprintf("%o %x", st.Mode(), sha256.Sum256(b))
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return all
}

// untouched wants do to change no file.
func (h *house) untouched(do func()) {
	h.t.Helper()
	before := h.tree()
	do()
	if after := h.tree(); !maps.Equal(before, after) {
		for p, v := range after {
			if before[p] != v {
				h.t.Errorf("%s was written", p)
			}
		}
		for p := range before {
			if _, ok := after[p]; !ok {
				h.t.Errorf("%s was removed", p)
			}
		}
	}
}

func off(f *domain.Facts) libvirt.Domain {
	return libvirt.Domain{UUID: f.UUID, Name: f.Name, Persistent: true}
}

// holder is a process that holds a VM's lock as swtpm does.
func (h *house) holder(uuid string) (end func()) {
	h.t.Helper()
	c := exec.Command(testkit.Must[string](h.t)(os.Executable()), filepath.Join(h.dir(uuid), ".lock"))
	c.Env = append(os.Environ(), childMode+"=hold")
	c.SysProcAttr, c.WaitDelay = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}, time.Second
	in := testkit.Must[io.WriteCloser](h.t)(c.StdinPipe())
	out := testkit.Must[io.ReadCloser](h.t)(c.StdoutPipe())
	if err := c.Start(); err != nil {
		h.t.Fatal(err)
	}
	b := make([]byte, 100)
	n, _ := out.Read(b)
	if string(b[:n]) != "<nil>\n" {
		h.t.Fatalf("locking: %s", b[:n])
	}
	var once sync.Once
	end = func() {
		once.Do(func() {
			in.Close()
			c.Wait()
		})
	}
	h.t.Cleanup(end)
	return end
}

// decrypts wants the VM's state to be the plain one, under key.
func (h *house) decrypts(uuid string, key []byte) {
	h.t.Helper()
	got, err := statefile.Decrypt(h.read(uuid), key)
	if err != nil || !bytes.Equal(got, plainState(h.t)) {
		h.t.Fatalf("the vTPM is not what it was: %v", err)
	}
}

// belongs wants list, label and state of a VM to belong together.
func (h *house) belongs(f *domain.Facts) {
	h.t.Helper()
	r := h.g.peek().Get(f.UUID)
	if r == nil {
		h.t.Fatal("there is no record")
	}
	l, err := h.g.seeLabel(f)
	if err != nil || !l.Present || l.Damaged != "" || l.Digest != r.LabelDigest || len(r.PendingLabel) > 0 {
		h.t.Errorf("the label is %+v, %v; the record has %s, %d waiting", l, err, r.LabelDigest, len(r.PendingLabel))
	}
	dir := testkit.Must[*statedir.Seen](h.t)(statedir.Look(h.dir(f.UUID)))
	if dir.Exists() && dir.Digest != r.Baseline {
		h.t.Error("the baseline is not that of the state")
	}
}
