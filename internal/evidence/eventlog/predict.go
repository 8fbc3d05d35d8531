package eventlog

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The kinds of a Component.
const (
	Kernel  = "kernel"
	Initrd  = "initrd"
	Unified = "uki"
	Shim    = "shim"
	Other   = "file"    // any file that is found by its old content or its path
	Cmdline = "cmdline" // Text is the kernel's new command line
)

// Component is something that will be another one at the next boot.
type Component struct {
	Kind string
	New  File
	Old  []File // what may be there now, the first that the log knows counts
	// Path of an Other is where the present file lies, for a log that names it. Of
	// another kind it is the name of an Old that was meant: no other one will do.
	Path string
	Text string // of Cmdline
}

// NotReplayed is why nothing can be told of the next boot: the log does not
// lead to PCRs as they are.
type NotReplayed struct{ PCRs []uint }

func (e *NotReplayed) Error() string {
	return "the event log does not lead to the values of PCR " + strings.Trim(strings.Join(strings.Fields(fmt.Sprint(e.PCRs)), ", "), "[]")
}

// phases are what systemd-pcrphase measures while the host boots, which no
// log of the firmware has: each or none, in this order (systemd-pcrphase(8)).
var phases = []string{"enter-initrd", "leave-initrd", "sysinit", "ready"}

// Explain gives the log, of one bank, that leads to live, the PCRs as they are.
// Boot phases that systemd measured later are added to it.
func (l *Log) Explain(bank string, live map[uint][]byte) (*Log, error) {
	out, err := l.Bank(bank)
	if err != nil {
		return nil, err
	}
	at, err := out.Replay(bank)
	if err != nil {
		return nil, err
	}
	var differ []uint
	for p, v := range live {
		if !bytes.Equal(at[p], v) {
			differ = append(differ, p)
		}
	}
	slices.Sort(differ)
	if slices.Equal(differ, []uint{pcrUnified}) {
		for some := range 1 << len(phases) {
			with := &Log{Algorithms: out.Algorithms, Legacy: out.Legacy, Events: slices.Clone(out.Events)}
			for i, phase := range phases {
				if some&(1<<i) != 0 {
					with.Events = append(with.Events, Event{PCR: pcrUnified, Type: IPL, Digests: [][]byte{hashOf(bank, []byte(phase))}, Data: []byte(phase)})
				}
			}
			if at, err := with.Replay(bank); err == nil && bytes.Equal(at[pcrUnified], live[pcrUnified]) {
				return with, nil
			}
		}
	}
	if len(differ) > 0 {
		return nil, &NotReplayed{differ}
	}
	return out, nil
}

func hashOf(bank string, parts ...[]byte) []byte {
	_, h, _ := bankOf(bank)
	w := h.New()
	for _, p := range parts {
		w.Write(p)
	}
	return w.Sum(nil)
}

// Predict gives the log, of one bank, of a boot that is like the one of l, which
// Explain gave, but for some components. A component that the log does not know
// is an error: what follows from it cannot be told. PCRs are those that have to be
// right: a change of another one may remain unpredicted.
func (l *Log) Predict(bank string, pcrs []uint, components ...Component) (*Log, error) {
	if len(components) == 0 {
		return nil, errors.New("no component is named that will be another one")
	}
	now, err := l.Bank(bank)
	if err != nil {
		return nil, err
	}
	next := &Log{Algorithms: now.Algorithms, Legacy: now.Legacy, Events: slices.Clone(now.Events)}
	p := &prediction{bank: bank, now: now, next: next, pcrs: pcrs}
	for _, c := range components {
		if err := p.replace(c); err != nil {
			return nil, err
		}
	}
	if p.unified != nil {
		next.Events = p.events()
	}
	return next, nil
}

type prediction struct {
	bank      string
	now, next *Log
	pcrs      []uint
	unified   []Event // in place of the present image's sections; nil: they stay
}

// put gives every event that is of type t in a PCR, or of any type where t is 0,
// and has the digest old, the digest new; it counts them.
func (p *prediction) put(pcr uint32, t EventType, old, new []byte) int {
	n := 0
	if old == nil || new == nil {
		return 0
	}
	for i, e := range p.now.Events {
		if e.PCR == pcr && e.measured() && (t == 0 || e.Type == t) && bytes.Equal(e.digest(), old) {
			p.set(i, new, nil)
			n++
		}
	}
	return n
}

func (p *prediction) set(i int, digest, data []byte) {
	p.next.Events[i].Digests = [][]byte{digest}
	if data != nil {
		p.next.Events[i].Data = data
	}
}

// find gives the first event for which is holds, -1 if there is none.
func (p *prediction) find(is func(*Event) bool) int {
	for i := range p.now.Events {
		if e := &p.now.Events[i]; e.measured() && is(e) {
			return i
		}
	}
	return -1
}

func (p *prediction) replace(c Component) error {
	if c.Kind == Cmdline {
		return p.cmdline(c.Text)
	}
	if c.Kind == Unified && len(c.New.Sections) == 0 {
		return fmt.Errorf("%s is no unified kernel image", c.New.Name)
	}
	if (c.Kind == Kernel || c.Kind == Shim) && c.New.Image == nil {
		return fmt.Errorf("%s is no image that firmware boots", c.New.Name)
	}
	for _, old := range c.Old {
		if isImage := old.Image != nil; isImage != (c.New.Image != nil) || c.Kind == Initrd && isImage {
			continue
		}
		n := p.put(pcrImages, BootApplication, old.Image, c.New.Image)
		if n > 0 && old.Sections != nil {
			return p.image(old, c.New)
		}
		if c.Kind == Unified {
			continue
		}
		n += p.put(pcrFiles, IPL, old.Flat, c.New.Flat)
		n += p.put(pcrFiles, EventTag, old.Flat, c.New.Flat)
		if n > 0 {
			return nil
		}
	}
	return p.byName(c)
}

// byName finds what a component replaces by what the log says of itself: the
// present file is not there any more to be held against it.
func (p *prediction) byName(c Component) error {
	missing := fmt.Errorf("the event log does not show what %s takes the place of; name the present file: OLD=NEW", c.New.Name)
	if c.Path != "" && c.Kind != Other {
		return fmt.Errorf("the event log does not show %s, which %s would take the place of", c.Path, c.New.Name)
	}
	n := 0
	switch c.Kind {
	case Shim:
		// The first image from a file system is the one that the firmware starts.
		i := p.find(func(e *Event) bool {
			return e.PCR == pcrImages && e.Type == BootApplication && strings.HasPrefix(e.imagePath(), `\`)
		})
		if i < 0 || p.find(func(e *Event) bool { return e.PCR == pcrMachineKeys && e.Describe().What == "shim's variable MokList" }) < i {
			return missing
		}
		n = p.put(pcrImages, BootApplication, p.now.Events[i].digest(), c.New.Image)
	case Kernel, Initrd:
		path := p.grubFile(map[string][]string{Kernel: {"linux", "linuxefi"}, Initrd: {"initrd", "initrdefi"}}[c.Kind])
		if path == "" {
			return missing
		}
		i := p.find(func(e *Event) bool { s, _ := text(e.Data); return e.PCR == pcrFiles && e.Type == IPL && s == path })
		if i < 0 {
			return missing
		}
		flat := p.now.Events[i].digest()
		n = p.put(pcrFiles, 0, flat, c.New.Flat)
		if c.Kind == Kernel { // shim, asked by GRUB, measures it as an image
			for j, e := range p.now.Events[i:] {
				if e.PCR == pcrImages && e.Type == BootApplication {
					p.set(i+j, c.New.Image, nil)
				}
			}
		}
	case Other:
		for i, e := range p.now.Events {
			switch s, _ := text(e.Data); {
			case e.PCR == pcrFiles && e.Type == IPL && isPath(s, c.Path):
				p.set(i, c.New.Flat, nil)
				n++
			case e.PCR == pcrImages && e.Type == BootApplication && c.New.Image != nil && isPath(strings.ToLower(strings.ReplaceAll(e.imagePath(), `\`, "/")), strings.ToLower(c.Path)):
				p.set(i, c.New.Image, nil)
				n++
			}
		}
	}
	if n == 0 {
		return missing
	}
	return nil
}

// grubFile is the path that the last of GRUB's commands of these names has.
func (p *prediction) grubFile(names []string) (path string) {
	for _, e := range p.now.Events {
		s, _ := text(e.Data)
		cmd, ok := strings.CutPrefix(s, grubCommand)
		if words := strings.Fields(cmd); ok && e.PCR == pcrGRUBText && len(words) > 1 && slices.Contains(names, words[0]) {
			path = words[1]
		}
	}
	return path
}

// isPath reports whether a path of a boot loader, which knows no mounts, may be
// the file at path: "(hd0,gpt2)/grub/grub.cfg" is /boot/grub/grub.cfg.
func isPath(loader, path string) bool {
	if rest, ok := strings.CutPrefix(loader, "("); ok {
		_, loader, _ = strings.Cut(rest, ")")
	}
	return strings.HasPrefix(loader, "/") && len(loader) > 1 && strings.HasSuffix(path, loader)
}

// image replaces a unified kernel image.
func (p *prediction) image(old, new File) error {
	p.put(pcrImages, BootApplication, old.Linux, new.Linux)
	if i := p.find(func(e *Event) bool { return e.PCR == pcrFiles && e.Describe().kind == tagOptions }); i >= 0 {
		switch {
		case bytes.Equal(p.now.Events[i].digest(), old.Options) && new.Options != nil:
			p.set(i, new.Options, nil)
		case slices.Contains(p.pcrs, pcrFiles) && bytes.Equal(p.now.Events[i].digest(), old.Options):
			return fmt.Errorf("%s has no command line", new.Name)
		}
	}
	initrd := func(f File) []byte {
		if i := slices.IndexFunc(f.Sections, func(s Section) bool { return s.Name == ".initrd" }); i >= 0 {
			return f.Sections[i].Digest
		}
		return nil
	}
	if i := p.find(func(e *Event) bool { return e.PCR == pcrFiles && e.Describe().kind == tagInitrd }); i >= 0 {
		if p.put(pcrFiles, EventTag, initrd(old), initrd(new)) == 0 && slices.Contains(p.pcrs, pcrFiles) {
			return errors.New("the present initrd is not the one of the unified kernel image alone (credentials or extensions come with it): PCR 9 of the next boot cannot be told")
		}
	}
	return p.sections(old, new)
}

// sections works out what systemd-stub measures of the new image: which
// sections it knows is learnt from the present one.
func (p *prediction) sections(old, new File) error {
	var seen []string
	for i, e := range p.now.Events {
		s, _ := text(e.Data)
		if e.PCR == pcrUnified && e.Type == IPL && strings.HasPrefix(s, ".") && bytes.Equal(e.digest(), hashOf(p.bank, []byte(s+"\x00"))) {
			k := slices.IndexFunc(old.Sections, func(o Section) bool { return o.Name == s })
			if k < 0 || i+1 >= len(p.now.Events) || !bytes.Equal(p.now.Events[i+1].digest(), old.Sections[k].Digest) {
				return fmt.Errorf("section %s in the event log is not the one of %s", clean(s), old.Name)
			}
			seen = append(seen, s)
		}
	}
	if len(seen) == 0 {
		if slices.Contains(p.pcrs, pcrUnified) {
			return errors.New("the event log shows no sections of a unified kernel image")
		}
		return nil
	}
	p.unified = []Event{}
	for _, s := range new.Sections {
		wasThere := slices.ContainsFunc(old.Sections, func(o Section) bool { return o.Name == s.Name })
		if wasThere && !slices.Contains(seen, s.Name) {
			continue // a section that this systemd-stub does not measure
		}
		for _, digest := range [][]byte{hashOf(p.bank, []byte(s.Name+"\x00")), s.Digest} {
			p.unified = append(p.unified, Event{PCR: pcrUnified, Type: IPL, Digests: [][]byte{digest}, Data: wide(s.Name)})
		}
	}
	return nil
}

// events puts the new sections where the old ones begin.
func (p *prediction) events() []Event {
	var out []Event
	put := false
	for _, e := range p.next.Events {
		s, _ := text(e.Data)
		if e.PCR == pcrUnified && e.Type == IPL && strings.HasPrefix(s, ".") {
			if !put {
				out, put = append(out, p.unified...), true
			}
			continue
		}
		out = append(out, e)
	}
	return out
}

// cmdline replaces the kernel's command line in all the forms in which it is
// measured. What cannot be reproduced from the present one is an error, if its PCR
// counts.
func (p *prediction) cmdline(line string) error {
	old, path := "", ""
	for i, e := range p.now.Events {
		s, _ := text(e.Data)
		switch rest, grub := strings.CutPrefix(s, grubCmdline); {
		case e.PCR == pcrGRUBText && grub && bytes.Equal(e.digest(), hashOf(p.bank, []byte(rest))):
			// GRUB puts the kernel's path before it.
			var args string
			if path, args, _ = strings.Cut(rest, " "); old == "" {
				old = args
			}
			p.set(i, hashOf(p.bank, []byte(path+" "+line)), []byte(grubCmdline+path+" "+line+"\x00"))
		case e.PCR == pcrKernelText && e.Type == IPL && bytes.Equal(e.digest(), hashOf(p.bank, e.Data)):
			old = s
			p.set(i, hashOf(p.bank, wide(line)), wide(line))
		}
	}
	if old == "" {
		return errors.New("the event log shows no command line of the kernel")
	}
	for i, e := range p.now.Events {
		s, _ := text(e.Data)
		cmd, grub := strings.CutPrefix(s, grubCommand)
		verb, _, _ := strings.Cut(cmd, " ")
		switch {
		case e.PCR == pcrFiles && e.Describe().kind == tagOptions:
			options := func(line string) [][]byte {
				return [][]byte{hashOf(p.bank, wide(line)), hashOf(p.bank, wide(path+" "+line)), hashOf(p.bank, wide("BOOT_IMAGE="+path+" "+line))}
			}
			n := slices.IndexFunc(options(old), func(d []byte) bool { return bytes.Equal(d, e.digest()) })
			if n < 0 && slices.Contains(p.pcrs, pcrFiles) {
				return errors.New("PCR 9 has another form of the command line, which cannot be told")
			}
			if n >= 0 {
				p.set(i, options(line)[n], nil)
			}
		case grub && e.PCR == pcrGRUBText && (verb == "linux" || verb == "linuxefi"):
			if was := verb + " " + path + " " + old; cmd == was && bytes.Equal(e.digest(), hashOf(p.bank, []byte(was))) {
				will := verb + " " + path + " " + line
				p.set(i, hashOf(p.bank, []byte(will)), []byte(grubCommand+will+"\x00"))
			} else if slices.Contains(p.pcrs, pcrGRUBText) {
				return errors.New("PCR 8 has GRUB's command in a form that cannot be told")
			}
		}
	}
	return nil
}
