package admin

import (
	"cmp"
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"virt-trust/internal/bus"
	"virt-trust/internal/platform/config"
	"virt-trust/internal/vtpm/ekcert"
	"virt-trust/internal/vtpm/reason"
)

// guard is virt-trustd as this command sees it.
type guard struct {
	*bus.Client
}

// props are the properties of one interface. What is missing or of another
// type reads as zero, so that an older or newer virt-trustd can be asked too.
// Texts are made fit for a terminal here, once: names are the users' choice.
type props map[string]dbus.Variant

func (p props) text(key string) string {
	s, _ := p[key].Value().(string)
	return reason.OneLine(s)
}

// lines is text for a value of several lines: PEM.
func (p props) lines(key string) string {
	s, _ := p[key].Value().(string)
	var b strings.Builder
	for line := range strings.Lines(s) {
		b.WriteString(reason.OneLine(strings.TrimRight(line, "\n")) + "\n")
	}
	return b.String()
}

func (p props) texts(key string) []string {
	all, _ := p[key].Value().([]string)
	var out []string
	for _, s := range all {
		out = append(out, reason.OneLine(s))
	}
	return out
}

func (p props) number(key string) uint64 {
	switch n := p[key].Value().(type) {
	case uint64:
		return n
	case uint32:
		return uint64(n)
	}
	return 0
}

func (p props) flag(key string) bool {
	b, _ := p[key].Value().(bool)
	return b
}

func (p props) numbers(key string) []uint32 {
	n, _ := p[key].Value().([]uint32)
	return append([]uint32{}, n...)
}

// time reads microseconds since 1970; nil for 0.
func (p props) time(key string) *time.Time {
	n := p.number(key)
	if n == 0 {
		return nil
	}
	t := time.UnixMicro(int64(n)).UTC()
	return &t
}

// Manager is the state of virt-trustd.
type Manager struct {
	Version     string `json:"version"`
	Mode        string `json:"mode"`
	ListState   string `json:"list_state"`
	ListProblem string `json:"list_problem,omitempty"`
	Generation  uint64 `json:"list_generation"`
	VMs         uint64 `json:"vms"`
	Libvirt     string `json:"libvirt"`
	Recovery    string `json:"recovery_key,omitempty"` // none, unconfirmed, confirmed, altered

	LaunchLog        string `json:"launch_log"` // replays, does-not-replay, unknown
	LaunchLogProblem string `json:"launch_log_problem,omitempty"`

	Counter       uint64 `json:"list_counter"`
	RaiseDue      bool   `json:"raise_due"`
	RaisedWithin  uint64 `json:"raised_within_us"` // microseconds
	RaisesLeft    uint64 `json:"raises_left"`
	RaisesPerYear uint64 `json:"raises_per_year"`
}

// listKnown reports whether the VM objects are all that the list holds.
func (m Manager) listKnown() bool { return m.ListState == "readable" || m.ListState == "empty" }

// listRefusal says why the list cannot be used.
func (m Manager) listRefusal() error {
	if r, ok := reason.Parse(m.ListProblem); ok {
		return r
	}
	code := map[string]reason.Code{
		"sealed": reason.HostNotApproved, "damaged": reason.ListDamaged, "rolled-back": reason.ListRolledBack,
	}[m.ListState]
	if code == "" {
		return errors.New("the vTPM list is " + m.ListState + ": " + m.ListProblem)
	}
	return &reason.Refusal{Code: code, What: m.ListProblem}
}

// Host is the host's TPM.
type Host struct {
	State         string   `json:"state"`
	Problem       string   `json:"problem,omitempty"`
	Device        string   `json:"device"`
	Manufacturer  string   `json:"manufacturer"`
	Bank          string   `json:"pcr_bank"`
	PCRs          []uint32 `json:"pcrs"`
	DifferingPCRs []uint32 `json:"differing_pcrs"`
	BindKeyName   string   `json:"bind_key_name"`
	BindKeyPublic string   `json:"bind_key_public,omitempty"`
	AKName        string   `json:"ak_name"`
	AKPublic      string   `json:"ak_public,omitempty"`
	// NextBoot is when the next boot was made one without PCR check.
	NextBoot *time.Time `json:"next_boot_unchecked,omitempty"`
}

// VM is one record of the vTPM list.
type VM struct {
	UUID       string `json:"uuid"`
	Name       string `json:"name"`
	State      string `json:"state"`
	StatePath  string `json:"state_path"`
	LabelPath  string `json:"label_path,omitempty"`
	LabelState string `json:"label_state"`
	LabelID    string `json:"label_id,omitempty"`
	KeyOwner   string `json:"key_owner"`
	Recovery   string `json:"recovery,omitempty"` // wrapped, none
	Baseline   string `json:"baseline,omitempty"`
	EKDigest   string `json:"ek_digest,omitempty"` // SHA-256 of the RSA EK's SubjectPublicKeyInfo
	// EKSharedWith are the UUIDs of VMs whose vTPMs have the same EK: copies.
	EKSharedWith []string   `json:"ek_shared_with,omitempty"`
	EKOrigin     string     `json:"ek_certificate_origin,omitempty"` // manufactured, taken-in; "" without a certificate
	Generation   uint64     `json:"generation"`
	Created      *time.Time `json:"created,omitempty"`
	Changed      *time.Time `json:"changed,omitempty"`
	LastVerdict  string     `json:"last_verdict,omitempty"`
	LastReason   string     `json:"last_reason,omitempty"`
	LastWhat     string     `json:"last_what,omitempty"`
	Reverts      uint64     `json:"reverts"`
	Reverted     *time.Time `json:"reverted,omitempty"`
}

func newVM(p props) VM {
	vm := VM{
		UUID: p.text("UUID"), Name: p.text("Name"), State: p.text("State"), StatePath: p.text("StatePath"),
		LabelPath: p.text("LabelPath"), LabelState: p.text("LabelState"), LabelID: p.text("LabelID"),
		KeyOwner: p.text("KeyOwner"), Recovery: p.text("Recovery"), Baseline: p.text("Baseline"), EKDigest: p.text("EKDigest"), Generation: p.number("Generation"),
		Created: p.time("Created"), Changed: p.time("Changed"),
		LastVerdict: p.text("LastVerdict"), LastReason: p.text("LastReason"), LastWhat: p.text("LastWhat"),
		Reverts: p.number("Reverts"), Reverted: p.time("Reverted"), EKSharedWith: p.texts("EKSharedWith"),
	}
	if der, _ := p["EKCertificate"].Value().([]byte); len(der) > 0 {
		said, err := ekcert.UntrustedParse(der)
		vm.EKOrigin = string(said.Origin)
		if err != nil {
			vm.EKOrigin = "not one of a vTPM"
		}
	}
	return vm
}

// properties reads all properties of one interface.
func (g *guard) properties(ctx context.Context, path dbus.ObjectPath, iface string) (props, error) {
	var p props
	call := g.Conn().Object(bus.Name, path).CallWithContext(ctx, "org.freedesktop.DBus.Properties.GetAll", 0, iface)
	if call.Err != nil {
		return nil, bus.MapError(call.Err)
	}
	return p, call.Store(&p)
}

func (g *guard) manager(ctx context.Context) (Manager, error) {
	p, err := g.properties(ctx, bus.Path, bus.ManagerInterface)
	return Manager{
		Version: p.text("Version"), Mode: p.text("Mode"),
		ListState: p.text("ListState"), ListProblem: p.text("ListProblem"), Generation: p.number("ListGeneration"),
		VMs: p.number("VMCount"), Libvirt: p.text("LibvirtState"), Recovery: p.text("RecoveryState"),
		LaunchLog: p.text("LaunchLogState"), LaunchLogProblem: p.text("LaunchLogProblem"),
		Counter: p.number("ListCounter"), RaiseDue: p.flag("RaiseDue"), RaisedWithin: p.number("RaisedWithin"),
		RaisesLeft: p.number("RaisesLeft"), RaisesPerYear: p.number("RaisesPerYear"),
	}, err
}

func (g *guard) host(ctx context.Context) (Host, error) {
	p, err := g.properties(ctx, bus.HostPath, bus.HostInterface)
	return Host{
		State: p.text("State"), Problem: p.text("Problem"), Device: p.text("Device"), Manufacturer: p.text("Manufacturer"),
		Bank: p.text("PCRBank"), PCRs: p.numbers("PCRSelection"), DifferingPCRs: p.numbers("DifferingPCRs"),
		BindKeyName: p.text("BindKeyName"), BindKeyPublic: p.lines("BindKeyPublic"),
		AKName: p.text("AKName"), AKPublic: p.lines("AKPublic"),
		NextBoot: p.time("NextBoot"),
	}, err
}

// vms gives the VMs of the list by name, in one call.
func (g *guard) vms(ctx context.Context) ([]VM, error) { return g.managed(ctx, 0) }

func (g *guard) managed(ctx context.Context, flags dbus.Flags) ([]VM, error) {
	var objects map[dbus.ObjectPath]map[string]map[string]dbus.Variant
	call := g.Conn().Object(bus.Name, bus.Path).CallWithContext(ctx, "org.freedesktop.DBus.ObjectManager.GetManagedObjects", flags)
	if call.Err != nil {
		return nil, bus.MapError(call.Err)
	}
	if err := call.Store(&objects); err != nil {
		return nil, err
	}
	vms := []VM{}
	for _, interfaces := range objects {
		if p, ok := interfaces[bus.VMInterface]; ok {
			vms = append(vms, newVM(props(p)))
		}
	}
	slices.SortFunc(vms, func(a, b VM) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.UUID, b.UUID))
	})
	return vms, nil
}

// change calls a method that polkit guards. Where an agent runs, it may ask
// the user for a password.
func (g *guard) change(ctx context.Context, method string, args ...any) (props, error) {
	var result props
	call := g.Conn().Object(bus.Name, bus.Path).CallWithContext(ctx, bus.ManagerInterface+"."+method,
		dbus.FlagAllowInteractiveAuthorization, args...)
	if call.Err != nil {
		return nil, bus.MapError(call.Err)
	}
	return result, call.Store(&result)
}

var uuidPattern = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// stateFolders gives the UUIDs of the VMs that have vTPM state in libvirt's
// folder, which only root can read.
func (c *Command) stateFolders() ([]string, error) {
	conf, err := config.Load(c.ConfigPath)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(conf.Swtpm.StateRoot)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	uuids := []string{}
	for _, e := range entries {
		if !e.IsDir() || !uuidPattern.MatchString(e.Name()) {
			continue
		}
		if tpms, _ := filepath.Glob(filepath.Join(conf.Swtpm.StateRoot, e.Name(), "tpm*")); len(tpms) > 0 {
			uuids = append(uuids, e.Name())
		}
	}
	return uuids, nil
}
