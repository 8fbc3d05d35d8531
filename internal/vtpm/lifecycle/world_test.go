package lifecycle

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"virt-trust/internal/vtpm/list"
	"virt-trust/internal/vtpm/reason"
	"virt-trust/internal/vtpm/statefile"
)

// A world in memory: what lies on the disk for a few VMs, a virt-trustd that
// does in the daemon's order what the rules decide, swtpms that write, crashes
// between any two steps, and someone who exchanges, edits and deletes. The
// ghosts of it know what is true; the rules have to find it out.
//
// Beyond it lies what no record can tell: someone who, while a VM runs or lies
// as a crash left it, puts back a state that was never noted or that has
// dropped out of the record's history.

// file is a state file. Its content is the vTPM as it was after write n.
type file struct {
	n    uint32         // 0: there is no file
	key  uint32         // of the vTPM that it was written under; 0: nobody's
	kind statefile.Kind // "" without a file
}

func (f file) digest() (d list.Digest) {
	if f.n == 0 {
		return d
	}
	binary.BigEndian.PutUint32(d[:], f.n)
	binary.BigEndian.PutUint32(d[4:], f.key)
	copy(d[8:], f.kind)
	return d
}

// payload is a label of the world: VM, key, serial number.
func payload(vm int, key, serial uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(vm)+1)
	b = binary.BigEndian.AppendUint32(b, key)
	return binary.BigEndian.AppendUint32(b, serial)
}

type vm struct {
	i              int
	uuid, name     string
	home, instance string // the folder that it should have, and the one that its XML names

	// On the disk.
	cur, old  file // in the folder; and, where cur was not made durable, what a power cut may leave instead
	volatile  bool // cur was not made durable
	strange   bool // there are files beside it
	label     []byte
	mangled   bool // the label is damaged
	kept      file
	keptLabel []byte
	journal   []list.Past
	of        uint64 // the opening that the journal belongs to
	r         *list.Record

	// In memory.
	session bool // virt-trustd's
	noted   []list.Past
	writes  bool // swtpm may have written
	on      bool // swtpm runs

	// Ghosts.
	key              uint32
	made             []uint32 // the vTPM's states, oldest first
	durable, before  int      // indexes of the last that was noted, and of the last but one; -1: none
	copies           []file   // that someone has taken
	curHit, keptHit  bool     // someone else has changed it
	oldHit           bool
	labelHit, xmlHit bool
	zeroed           bool // a power cut has spoilt cur
}

type world struct {
	t      *testing.T
	rand   *rand.Rand
	vms    [3]*vm
	up     bool // virt-trustd runs
	n      uint32
	clock  int64
	policy Policy

	steps, cutAt int
	last         []string // the last events
	figures      map[string]int
}

// cut is the panic of a process that is killed.
type cut struct{}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{t: t, rand: rand.New(rand.NewPCG(seed, 0)), figures: map[string]int{}, up: true, policy: Policy{Adopt: true}}
	for i := range w.vms {
		w.vms[i] = w.newVM(i)
	}
	return w
}

func (w *world) newVM(i int) *vm {
	home := fmt.Sprintf("/s/%d/tpm2", i)
	v := &vm{i: i, uuid: fmt.Sprintf("%08d", i), name: fmt.Sprint("vm", i), home: home, instance: home, durable: -1, before: -1}
	if w.rand.IntN(2) == 0 { // as plain libvirt made it
		w.n++
		v.cur, v.made, v.durable = file{w.n, 0, statefile.Plain}, []uint32{w.n}, 0
		v.before = 0
	}
	return v
}

func (w *world) fatal(v *vm, format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf("VM %d: %s\n%+v\nrecord %+v\nevents:\n%s", v.i, fmt.Sprintf(format, args...), *v, v.r, strings.Join(w.last, "\n"))
}

func (w *world) happens(v *vm, what string) {
	if len(w.last) == 60 {
		w.last = slices.Delete(w.last, 0, 1)
	}
	w.last = append(w.last, what+" "+v.name)
}

// step is a point at which virt-trustd may be killed.
func (w *world) step() {
	if w.steps++; w.steps == w.cutAt {
		panic(cut{})
	}
}

// daemon has virt-trustd do something, and perhaps cuts it short.
func (w *world) daemon(do func()) (done bool) {
	w.steps, w.cutAt = 0, 0
	if w.rand.IntN(4) == 0 {
		w.cutAt = 1 + w.rand.IntN(14)
	}
	defer func() {
		w.cutAt = 0
		if p := recover(); p != nil {
			if _, ok := p.(cut); !ok {
				panic(p)
			}
			w.figures["cut short"]++
			if w.rand.IntN(3) == 0 {
				w.powerCut()
			} else {
				w.kill()
			}
		}
	}()
	do()
	return true
}

func (w *world) commit(v *vm, r *list.Record) {
	w.step()
	v.r = r
	if r != nil {
		w.answersFor(v, r.Baseline)
	}
	w.step()
}

// answersFor tells the ghosts that a state was noted.
func (w *world) answersFor(v *vm, d list.Digest) {
	if i := slices.IndexFunc(v.made, func(n uint32) bool { return file{n, v.key, statefile.Encrypted}.digest() == d }); i > v.durable {
		v.before, v.durable = v.durable, i
	}
}

func (v *vm) files() []list.Past {
	if v.r == nil || !v.r.Open || v.of != v.r.Generation ||
		v.r.Noted && !slices.ContainsFunc(v.journal, func(p list.Past) bool { return p.Digest == v.r.Baseline }) {
		return nil
	}
	return v.journal
}

func (w *world) see(v *vm) Seen {
	s := Seen{UUID: v.uuid, Name: v.name, Instance: v.instance, KeyOwner: list.Ours, Kept: v.kept.digest(), Journal: v.files()}
	cur := w.at(v.instance).cur
	s.State = StateSeen{Exists: cur.n != 0, Kind: cur.kind, Digest: cur.digest()}
	if w.at(v.instance).strange {
		s.State.Strange = []string{"tpm2-00.volatilestate"}
	}
	for _, o := range w.vms {
		if o == v || o.r == nil {
			continue
		}
		if cur.n != 0 && o.r.Baseline == cur.digest() {
			s.State.OtherVM = o.name
		}
		if o.r.Instance == v.instance {
			s.FolderOf = o.name
		}
	}
	s.Label = LabelSeen{Path: "/i"}
	if v.label != nil {
		s.Label = LabelSeen{Path: "/i", Present: true, Digest: list.DigestOf(v.label), ThisHost: true, VM: w.vms[binary.BigEndian.Uint32(v.label)-1].uuid}
		if v.mangled {
			s.Label.Damaged = "cut off"
		}
	}
	return s
}

func (w *world) at(instance string) *vm {
	for _, v := range w.vms {
		if v.home == instance {
			return v
		}
	}
	panic(instance)
}

func (v *vm) auth(f file) Auth {
	if f.kind == statefile.Encrypted && f.key != 0 && f.key == keyOf(v.r) {
		return Authentic
	}
	return Forged
}

func keyOf(r *list.Record) uint32 { return binary.BigEndian.Uint32(r.WrappedKeys) }

// replace is statedir.Replace: durable when it is done.
func (w *world) replace(v *vm, f file) {
	w.step()
	v.cur, v.volatile, v.curHit, v.zeroed = f, false, false, false
	w.step()
}

func (w *world) keep(v *vm, f file) {
	w.step()
	v.kept, v.keptHit = f, false
	w.step()
}

func (w *world) decide(v *vm) (Decision, Seen) {
	auth, restored := NotAsked, false
	for range 4 {
		s := w.see(v)
		if auth != NotAsked {
			s.State.Auth = v.auth(w.at(v.instance).cur)
		}
		s.Restored = restored
		d := Prepare(v.r, s, w.policy)
		switch d.Plan {
		case Authenticate:
			auth = Authentic
			continue
		case RestoreKept:
			hit, zeroed := v.curHit, v.zeroed
			w.replace(v, v.kept)
			restored = true
			v.curHit, v.zeroed = hit, zeroed
			continue
		}
		return d, s
	}
	w.fatal(v, "the rules come to no end")
	panic("")
}

// prepare does what the hook waits for. It gives the refusal, if it is one.
func (w *world) prepare(v *vm) *reason.Refusal {
	for range 4 {
		d, s := w.decide(v)
		switch d.Plan {
		case Refuse:
			return d.Refusal
		case Create:
			w.create(v)
			continue
		case AdoptPlain:
			w.create(v)
			continue
		case FinishAdoption:
			w.finishAdoption(v)
			continue
		case StartFirstLabel:
			r := v.r.Clone()
			r.PendingLabel = w.newLabel(v, keyOf(r))
			w.commit(v, r)
			w.open(v, w.writePending(v, r), d, s)
		case StartNewLabel:
			w.open(v, w.writePending(v, v.r.Clone()), d, s)
		case Start, StartRecovered, StartFresh:
			w.open(v, v.r, d, s)
		default:
			w.fatal(v, "a plan of %s", d.Plan)
		}
		return nil
	}
	w.fatal(v, "prepare comes to no end")
	panic("")
}

func (w *world) open(v *vm, r *list.Record, d Decision, s Seen) {
	r = Opened(r, "boot", w.clock)
	for _, j := range s.Journal {
		r.SetBaseline(j.Digest, j.Time)
	}
	if d.Plan == StartRecovered {
		r.SetBaseline(s.State.Digest, w.clock)
	}
	r.AdoptFrom = list.Digest{}
	if s.State.Exists {
		w.keep(v, v.cur)
	}
	w.commit(v, r)
	v.journal = nil
	w.step()
	v.session, v.noted, v.writes = true, nil, false
}

func (w *world) newLabel(v *vm, key uint32) []byte {
	w.n++
	w.step()
	v.keptLabel = payload(v.i, key, w.n)
	w.step()
	return v.keptLabel
}

func (w *world) writePending(v *vm, r *list.Record) *list.Record {
	if len(r.PendingLabel) == 0 {
		return r
	}
	w.step()
	v.label, v.mangled, v.labelHit = r.PendingLabel, false, false
	w.step()
	n := r.Clone()
	n.LabelPath, n.LabelDigest, n.PendingLabel = "/i", list.DigestOf(r.PendingLabel), nil
	return n
}

// create makes keys, record and label; a plain state is taken in.
func (w *world) create(v *vm) {
	w.n++
	key := w.n
	r := &list.Record{
		UUID: v.uuid, Name: v.name, Instance: v.instance, State: list.Created, KeyOwner: list.Ours, WrappedKeys: binary.BigEndian.AppendUint32(nil, key),
	}
	r.PendingLabel = w.newLabel(v, key)
	if v.cur.kind == statefile.Plain {
		w.takeIn(v, r)
	} else {
		v.key, v.made, v.durable, v.before = key, nil, -1, -1
		w.commit(v, r)
	}
	n := w.writePending(v, r)
	n.AdoptFrom = list.Digest{}
	w.commit(v, n)
}

func (w *world) takeIn(v *vm, r *list.Record) {
	plain := v.cur
	enc := file{plain.n, keyOf(r), statefile.Encrypted}
	w.keep(v, enc)
	r.State, r.Baseline, r.AdoptFrom = list.Stored, enc.digest(), plain.digest()
	v.key = enc.key
	w.commit(v, r)
	w.replace(v, enc)
}

func (w *world) finishAdoption(v *vm) {
	if v.kept.digest() == v.r.Baseline {
		w.replace(v, v.kept)
		return
	}
	w.takeIn(v, v.r.Clone())
}

// settle is what follows a write: it is made durable, kept and noted.
func (w *world) settle(v *vm) (sound bool) {
	if !v.session || v.r == nil || !v.r.Open {
		return true
	}
	newest := Newest(v.r, v.noted)
	d := v.cur.digest()
	switch {
	case v.cur.n == 0:
		return newest.IsZero()
	case d == newest:
		return true
	}
	w.step()
	v.volatile = false
	w.step()
	if !v.writes && !newest.IsZero() || Familiar(v.r, v.noted, d) || v.auth(v.cur) != Authentic {
		return false
	}
	w.keep(v, v.cur)
	v.noted = append(v.noted, list.Past{Digest: d, Time: w.clock})
	if len(v.noted) == 1 || v.of != v.r.Generation {
		v.journal, v.of = nil, v.r.Generation
	}
	v.journal = append(slices.Clone(v.journal), v.noted[len(v.noted)-1])
	w.answersFor(v, d)
	w.step()
	return true
}

// checkpoint takes what a running VM has written into its record.
func (w *world) checkpoint(v *vm) {
	if n := len(v.noted); !v.session || v.r == nil || !v.r.Open || n == 0 || v.noted[n-1].Digest == v.r.Baseline {
		return
	}
	r := v.r.Clone()
	for _, p := range v.noted {
		r.SetBaseline(p.Digest, p.Time)
		r.Noted = true
	}
	w.commit(v, r)
}

// write is swtpm's.
func (w *world) write(v *vm) {
	if !v.volatile {
		v.old, v.oldHit = v.cur, v.curHit
	}
	w.n++
	v.cur, v.volatile, v.curHit, v.zeroed = file{w.n, v.key, statefile.Encrypted}, true, false, false
	v.made = append(v.made, w.n)
	v.copies = append(v.copies, v.cur)
	if n := len(v.copies); n > 40 {
		v.copies = slices.Delete(v.copies, 0, n-40)
	}
}

// start is libvirt's start of a VM from its hook to its swtpm's load.
func (w *world) start(v *vm) *reason.Refusal {
	if v.on || !w.up {
		return nil
	}
	var refusal *reason.Refusal
	if !w.daemon(func() { refusal = w.prepare(v) }) {
		return nil
	}
	if refusal != nil {
		w.figures["refused"]++
		return refusal
	}
	if v.instance != v.home {
		w.fatal(v, "it starts with another VM's folder")
	}
	if w.rand.IntN(20) == 0 {
		w.attack(v)
		v.instance = v.home // libvirt has read the XML by now
	}
	v.on = true
	if v.cur.n == 0 && v.durable < 0 {
		v.made = nil
		w.write(v) // swtpm_setup
	} else if v.cur.n == 0 && !v.curHit {
		w.fatal(v, "lost: it starts with a blank vTPM")
	}
	sound := true
	if !w.daemon(func() { sound = w.settle(v) }) { // the hook at start
		if w.up {
			w.stop(v)
		}
		return nil
	}
	if !sound {
		w.figures["stopped before QEMU"]++
		w.stop(v)
		return nil
	}
	v.writes = true
	w.loads(v)
	return nil
}

// loads has a swtpm take its state: here nothing wrong may lie.
func (w *world) loads(v *vm) {
	w.figures["started"]++
	i := slices.Index(v.made, v.cur.n)
	switch {
	case v.cur.kind != statefile.Encrypted || v.cur.key != v.key || i < 0:
		w.fatal(v, "wrongly started: not with its own vTPM")
	case i < v.before:
		w.fatal(v, "wrongly started: with a state older than the last but one noted (%d, %d, %d)", i, v.before, v.durable)
	}
	for _, o := range w.vms {
		if o != v && o.on && (o.key == v.key || o.instance == v.instance) {
			w.fatal(v, "two copies live: VM %d runs with the same vTPM", o.i)
		}
	}
	v.made, v.durable, v.before = v.made[:i+1], i, i
}

// stop ends a VM. virt-trustd, if it is there, is told.
func (w *world) stop(v *vm) {
	v.on = false
	if w.up {
		w.daemon(func() { w.stopped(v) })
	}
}

func (w *world) stopped(v *vm) {
	switch {
	case v.r == nil || !v.r.Open:
		v.session = false
	case v.session:
		w.rest(v)
	default:
		w.closeAfterCrash(v)
	}
}

func (w *world) rest(v *vm) {
	entries := v.noted
	if !v.session {
		entries = v.files()
	}
	auth := NoKey
	if v.cur.n != 0 {
		w.step()
		v.volatile = false
		w.step()
		if v.cur.digest() != v.r.Baseline {
			auth = v.auth(v.cur)
		}
	}
	if v.session && !v.writes && !Newest(v.r, entries).IsZero() {
		auth = Forged
	}
	n, _ := Rest(v.r, v.cur.digest(), auth, entries, false, w.clock)
	if v.cur.n != 0 && n.Baseline == v.cur.digest() {
		w.keep(v, v.cur)
	}
	w.commit(v, w.writePending(v, n))
	v.journal = nil
	w.step()
	v.session, v.noted = false, nil
}

func (w *world) closeAfterCrash(v *vm) {
	s := w.see(v)
	s.Kept, s.State.Auth = list.Digest{}, NoKey
	if v.cur.n != 0 && v.cur.digest() != v.r.Baseline {
		s.State.Auth = v.auth(v.cur)
	}
	switch State(v.r, s, w.policy).Plan {
	case Start, StartFresh, StartRecovered:
		w.rest(v)
	}
}

// kill ends virt-trustd alone.
func (w *world) kill() {
	w.up = false
	for _, v := range w.vms {
		v.session, v.noted = false, nil
	}
}

// boot starts virt-trustd, which looks at what it finds.
func (w *world) boot() {
	w.up = true
	for _, v := range w.vms {
		if v.r == nil || !v.r.Open {
			continue
		}
		if !w.daemon(func() {
			if !v.on {
				w.closeAfterCrash(v)
				return
			}
			v.session, v.noted, v.writes = true, slices.Clone(v.files()), true
			w.settle(v)
		}) {
			return
		}
	}
}

// powerCut ends everything. What was not made durable is there, or not, or zeros.
func (w *world) powerCut() {
	w.figures["power cuts"]++
	w.kill()
	for _, v := range w.vms {
		v.on = false
		if !v.volatile {
			continue
		}
		v.volatile = false
		switch w.rand.IntN(3) {
		case 0:
			v.cur, v.curHit = v.old, v.oldHit
		case 1:
			w.n++
			v.cur, v.zeroed = file{w.n, 0, statefile.Damaged}, true
		}
		if i := slices.Index(v.made, v.cur.n); i >= 0 && i >= v.durable {
			v.made = v.made[:i+1]
		} else {
			v.made = v.made[:max(v.durable, slices.Index(v.made, v.kept.n))+1]
		}
	}
}

// attack has someone who writes all files, but the list, do something.
func (w *world) attack(v *vm) {
	o := w.vms[w.rand.IntN(len(w.vms))]
	put := func(f file) { v.cur, v.volatile, v.curHit, v.zeroed = f, false, true, false }
	if v.r == nil {
		return // before it is guarded, what lies there is the VM's
	}
	w.figures["attacks"]++
	switch what := w.rand.IntN(13); what {
	case 0, 1: // an older one of its own
		if len(v.copies) == 0 {
			return
		}
		f := v.copies[w.rand.IntN(len(v.copies))]
		if v.r.Open && !w.remembered(v, f) || f.key == keyOf(v.r) && f.digest() == v.r.Baseline {
			return
		}
		w.happens(v, fmt.Sprint("attack: older state ", f.n))
		put(f)
	case 2:
		if o == v || o.cur.n == 0 || o.cur.key == v.key && !w.remembered(v, o.cur) {
			return
		}
		w.happens(v, "attack: another VM's state")
		put(o.cur)
	case 3:
		w.happens(v, "attack: state deleted")
		put(file{})
	case 4:
		w.happens(v, "attack: state edited")
		w.n++
		put(file{w.n, 0, statefile.Encrypted})
	case 5:
		w.happens(v, "attack: state cut off")
		w.n++
		put(file{w.n, 0, statefile.Damaged})
	case 6:
		w.happens(v, "attack: plain state")
		w.n++
		put(file{w.n, 0, statefile.Plain})
	case 7:
		w.happens(v, "attack: a file beside the state")
		v.strange = true
	case 8:
		w.happens(v, "attack: label removed")
		v.label, v.labelHit = nil, true
	case 9:
		if v.label == nil {
			return
		}
		w.happens(v, "attack: label edited")
		v.mangled, v.labelHit = true, true
	case 10:
		if o == v || o.label == nil {
			return
		}
		w.happens(v, "attack: another VM's label")
		v.label, v.mangled, v.labelHit = o.label, o.mangled, true
	case 11:
		if o == v || v.on {
			return
		}
		w.happens(v, "attack: another VM's folder")
		v.instance, v.xmlHit = o.home, true
	case 12:
		if v.curHit || len(v.copies) == 0 {
			return // one of the two copies is left alone
		}
		f := v.copies[w.rand.IntN(len(v.copies))]
		if !w.remembered(v, f) {
			return
		}
		w.happens(v, "attack: the kept state")
		v.kept, v.keptHit = f, true
	}
}

// remembered reports whether the record will know a state as an older one even
// when all that was noted has come into it.
func (w *world) remembered(v *vm, f file) bool {
	r := v.r.Clone()
	for _, p := range v.files() {
		r.SetBaseline(p.Digest, p.Time)
	}
	_, past := r.Past(f.digest())
	return past
}

// The admin.

func (w *world) repair(v *vm) *reason.Refusal {
	if v.session && v.r != nil && v.r.Open {
		w.rest(v)
	}
	s := w.see(v)
	if v.r == nil {
		return reason.Refuse(reason.VTPMUnknown, "'virt-trust adopt'", "")
	}
	if v.r.Instance != v.instance {
		return reason.Refuse(reason.VTPMChanged, "put it back", "")
	}
	relabel := !s.Label.Present || s.Label.Digest != v.r.LabelDigest || v.mangled
	if relabel && s.Label.Present && s.Label.Damaged == "" && s.Label.VM != v.uuid {
		return reason.Refuse(reason.LabelOtherVM, "put the VM's own image back", "")
	}
	if relabel {
		w.relabel(v, v.r, false)
	}
	if newest := Newest(v.r, s.Journal); s.State.Digest != newest && !newest.IsZero() {
		d := v.kept.digest()
		_, old := v.r.Past(d)
		old = old || slices.ContainsFunc(s.Journal, func(p list.Past) bool { return p.Digest == d }) || d == v.r.Baseline
		if !Restorable(v.r, s, d) && (old || !v.r.Open || v.auth(v.kept) != Authentic) {
			return reason.Refuse(reason.VTPMMissing, "bring it back from a backup", "")
		}
		w.replace(v, v.kept)
		r := Settled(v.r, d, s.Journal, w.clock)
		w.commit(v, r)
		v.journal = nil
	}
	return nil
}

func (w *world) relabel(v *vm, r *list.Record, predecessor bool) {
	r = r.Clone()
	r.PendingLabel, r.LabelPath, r.LabelDigest = w.newLabel(v, keyOf(r)), "/i", list.Digest{}
	if predecessor && v.label != nil && !v.mangled && w.vms[binary.BigEndian.Uint32(v.label)-1] == v {
		r.LabelDigest = list.DigestOf(v.label)
	}
	w.commit(v, r)
	w.commit(v, w.writePending(v, r))
}

func (w *world) adopt(v *vm, fresh bool) *reason.Refusal {
	if v.session && v.r != nil && v.r.Open {
		w.rest(v)
	}
	s := w.see(v)
	if v.strange || s.FolderOf != "" {
		return Prepare(v.r, s, w.policy).Refusal
	}
	if v.r == nil {
		switch {
		case v.cur.kind == statefile.Plain, v.cur.n == 0 && (fresh || v.label == nil || s.Label.VM != v.uuid || v.mangled):
			w.create(v)
			return nil
		case v.cur.n == 0:
			return reason.Refuse(reason.VTPMMissing, "give the VM a new, empty vTPM with 'virt-trust adopt --new'", "")
		case fresh:
			w.startOver(v)
			return nil
		}
		return reason.Refuse(reason.KeyNotReleased, "give the VM a new, empty vTPM with 'virt-trust adopt --new'", "")
	}
	if v.cur.n == 0 && !Newest(v.r, s.Journal).IsZero() {
		if !fresh {
			return reason.Refuse(reason.VTPMMissing, "'virt-trust repair' puts the kept state back, 'virt-trust adopt --new' gives the VM a new, empty vTPM", "")
		}
		w.startOver(v)
		return nil
	}
	r := v.r.Clone()
	r.Instance = v.instance
	if v.cur.n != 0 {
		s.State.Auth = v.auth(v.cur)
		switch d := State(r, s, w.policy); d.Plan {
		case Start, StartRecovered:
			r = Settled(r, s.State.Digest, s.Journal, w.clock)
		case FinishAdoption:
			w.finishAdoption(v)
			r = v.r
		case RestoreKept:
			return reason.Refuse(reason.VTPMChanged, "'virt-trust repair' puts the kept state back", "")
		default:
			if fresh {
				w.startOver(v)
				return nil
			}
			return d.Refusal
		}
	}
	w.relabel(v, r, true)
	v.journal = nil
	return nil
}

// startOver sets aside what there is: the admin has given it up.
func (w *world) startOver(v *vm) {
	w.figures["given up by the admin"]++
	w.step()
	v.cur, v.volatile, v.curHit = file{}, false, false
	w.commit(v, nil)
	v.kept, v.keptLabel, v.journal, v.label, v.mangled = file{}, nil, nil, nil, false
	v.made, v.durable, v.before = nil, -1, -1
	w.create(v)
}

func (w *world) accept(v *vm) *reason.Refusal {
	s := w.see(v)
	switch {
	case v.r == nil:
		return reason.Refuse(reason.VTPMUnknown, "'virt-trust adopt'", "")
	case v.cur.n == 0:
		return reason.Refuse(reason.VTPMMissing, "'virt-trust repair' puts the kept state back", "")
	case v.cur.digest() == Newest(v.r, s.Journal):
		return nil
	case v.auth(v.cur) == Forged:
		return reason.Refuse(reason.VTPMChanged, "'virt-trust repair' puts the kept state back", "")
	}
	i := slices.Index(v.made, v.cur.n)
	if i < 0 { // of a branch that was left: it is now the only one
		v.made, i = []uint32{v.cur.n}, 0
	}
	w.keep(v, v.cur)
	v.made, v.durable, v.before = v.made[:i+1], i, i
	r := Settled(v.r, v.cur.digest(), s.Journal, w.clock)
	w.commit(v, r)
	v.journal = nil
	v.curHit = false
	return nil
}

// mend does one of the things that a refusal names, and gives what that was
// refused for, if it was.
func (w *world) mend(v *vm, r *reason.Refusal, tried map[string]bool) (refusal *reason.Refusal) {
	type way struct {
		words string
		do    func() *reason.Refusal
		hand  bool // not virt-trust's: what was tried before may work then
	}
	ownLabel := func() *reason.Refusal {
		v.label, v.mangled, v.labelHit = nil, false, false
		if v.r != nil {
			if v.keptLabel != nil && list.DigestOf(v.keptLabel) == v.r.LabelDigest {
				v.label = v.keptLabel
				return nil
			}
			return w.repair(v)
		}
		return nil
	}
	ways := []way{
		{"repair", func() *reason.Refusal { return w.repair(v) }, false},
		{"accept", func() *reason.Refusal { return w.accept(v) }, false},
		{"--new", func() *reason.Refusal { return w.adopt(v, true) }, false},
		{"move them away", func() *reason.Refusal { w.at(v.instance).strange = false; return nil }, true},
		{"own image back", ownLabel, true},
		{"put it back", func() *reason.Refusal { v.instance = v.home; return nil }, true},
		{"folder of its own", func() *reason.Refusal { v.instance = v.home; return nil }, true},
		{"remove", func() *reason.Refusal { v.cur, v.volatile, v.curHit = file{}, false, false; return nil }, true},
		{"from a backup", func() *reason.Refusal {
			if len(v.made) == 0 {
				return w.adopt(v, true) // there is none
			}
			i := w.rand.IntN(len(v.made)) // of the admin's own
			if v.r == nil || !w.remembered(v, file{v.made[i], v.key, statefile.Encrypted}) {
				i = max(v.durable, 0)
			}
			v.cur, v.volatile, v.curHit = file{v.made[i], v.key, statefile.Encrypted}, false, false
			return nil
		}, false},
	}
	if strings.Contains(strings.ReplaceAll(r.Mend, "--new", ""), "adopt") {
		ways = append(ways, way{"adopt", func() *reason.Refusal { return w.adopt(v, false) }, false})
	}
	var named []way
	for _, c := range ways {
		if strings.Contains(r.Mend, c.words) {
			named = append(named, c)
		}
	}
	if len(named) == 0 {
		w.fatal(v, "no way back is named: %s", r)
	}
	// An admin takes the first way that was not tried: what gives something up comes last.
	i := slices.IndexFunc(named, func(c way) bool { return !tried[c.words] })
	if v.curHit && !v.xmlHit && w.rand.IntN(4) == 0 {
		i = w.rand.IntN(len(named))
	}
	if i < 0 {
		w.fatal(v, "refused without a way back, all was tried: %s", r)
	}
	c := named[i]
	if c.hand {
		clear(tried)
	} else {
		tried[c.words] = true
	}
	w.happens(v, "mend by "+c.words)
	w.cutAt = 0
	return c.do()
}

// bringBack follows what refusals say until the VM starts.
func (w *world) bringBack(v *vm, r *reason.Refusal) {
	if !v.curHit && !v.keptHit && !v.labelHit && !v.strange && !v.xmlHit && !v.zeroed && !w.others(v) {
		w.fatal(v, "wrongly refused, nobody did anything: %s", r)
	}
	tried := map[string]bool{}
	for range 8 {
		w.happens(v, "refused: "+r.Text())
		if again := w.mend(v, r, tried); again != nil {
			r = again
			continue
		}
		w.cutAt = 0
		if r = w.prepare(v); r == nil {
			break
		}
	}
	if r != nil {
		w.fatal(v, "refused without a way back: %s", r)
	}
	w.figures["brought back"]++
	v.curHit, v.keptHit, v.labelHit, v.xmlHit, v.zeroed = false, false, false, false, false
	w.stopped(v)
}

// others reports whether someone who changed another VM stands in this one's way.
func (w *world) others(v *vm) bool {
	for _, o := range w.vms {
		if o != v && (o.xmlHit || o.curHit && o.cur.n == v.cur.n) {
			return true
		}
	}
	return false
}

// lost wants what virt-trustd answers for to be there still, but where someone
// took both copies.
func (w *world) lost(v *vm) {
	if v.r == nil || v.durable < 0 || v.curHit || v.keptHit {
		return
	}
	for _, f := range []file{v.cur, v.kept} {
		if i := slices.Index(v.made, f.n); i >= 0 && i >= v.before {
			return
		}
	}
	w.fatal(v, "lost: neither in its place nor kept")
}

func (w *world) event() {
	v := w.vms[w.rand.IntN(len(w.vms))]
	w.clock++
	if v.on {
		switch e := w.rand.IntN(100); {
		case e < 55:
			w.happens(v, "write")
			w.write(v)
			if w.up && w.rand.IntN(10) != 0 {
				w.daemon(func() { w.settle(v) })
			}
		case e < 85:
			w.happens(v, "stop")
			w.stop(v)
		case e < 91:
			w.attack(v)
		case e < 94:
			w.happens(v, "virt-trustd dies")
			w.kill()
		case e < 99 && !w.up:
			w.happens(v, "virt-trustd starts")
			w.boot()
		case e < 97:
			w.daemon(func() { w.settle(v) })
		case e < 99:
			w.daemon(func() { w.checkpoint(v) })
		default:
			w.happens(v, "power cut")
			w.powerCut()
		}
	} else {
		switch e := w.rand.IntN(100); {
		case e < 80 && w.up:
			w.happens(v, "start")
			if r := w.start(v); r != nil {
				w.bringBack(v, r)
			}
		case e < 80:
			w.happens(v, "virt-trustd starts")
			w.boot()
		case e < 97:
			w.attack(v)
		case e < 98 && w.up:
			w.happens(v, "undefined")
			*v = *w.newVM(v.i)
		default:
			w.happens(v, "power cut")
			w.powerCut()
		}
	}
	for _, v := range w.vms {
		w.lost(v)
	}
}

// Whatever happens to VMs, and whatever is done to what lies on the disk: none
// starts with a vTPM that is not its own newest, none is lost, and each refusal
// names a way that leads to a start.
func TestWorld(t *testing.T) {
	steps := 1_000_000
	if s := os.Getenv("VIRT_TRUST_STEPS"); s != "" {
		steps, _ = strconv.Atoi(s)
	}
	seed := rand.Uint64()
	if s := os.Getenv("VIRT_TRUST_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("seed %d", seed)
	w := newWorld(t, seed)
	for range steps {
		w.event()
	}
	t.Logf("figures: lifecycle: %d events, 0 vTPMs lost, 0 wrongly started, 0 refused without a way back; %v", steps, w.figures)
}
