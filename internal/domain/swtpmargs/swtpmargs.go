// Package swtpmargs reads the command lines of swtpm(8) and swtpm_setup(8) as
// their own parser, getopt_long(3), does, and puts keys into them. What it
// does not know stays as it is, where it is.
package swtpmargs

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"virt-trust/internal/domain"
)

// The programs whose command lines are known.
const (
	Swtpm      = "swtpm"
	SwtpmSetup = "swtpm_setup"
)

// Call is a command line that has been read.
type Call struct {
	Program   string // Swtpm or SwtpmSetup
	Probe     bool   // asks for information or touches no state: needs no keys
	StatePath string // of the state directory or, for file://, the file; cleaned; "" if none is named
	HasKey    bool   // the caller gave a key of its own
	TPM2      bool   // the TPM is one of family 2.0
	Config    string // of swtpm_setup: the configuration file that is named, "" if none is
	Socket    string // of swtpm: the path at which it makes its control socket, "" if it makes none or not at an absolute path

	argv []string
	args []arg
}

// arg is one or two words of argv.
type arg struct {
	name   string // long name in full, "" for anything but a known option
	value  string
	words  []string // as they were
	joined bool     // --name=value
	end    bool     // "--": the rest are no options
	open   bool     // the last word, an option that lacks its value or may lack one
}

// kind says what becomes of an option.
type kind uint8

const (
	flag    kind = iota // without a value
	value               // with a value
	probe               // a flag that makes the program print something and exit
	keyFlag             // with a value that names a key, or says how to read one
)

// The options, with swtpm 0.7 to 0.10 taken together. getopt_long(3) takes any
// unambiguous beginning of a name for the name, so all must be listed.
var long = map[string]map[string]kind{
	Swtpm: {
		"port": value, "fd": value, "chardev": value, "ctrl": value, "log": value, "locality": value, "pid": value,
		"tpmstate": value, "server": value, "flags": value, "runas": value, "seccomp": value, "migration": value,
		"profile": value, "name": value, "maj": value, "min": value, "print-info": value,
		"daemon": flag, "terminate": flag, "tpm2": flag, "vtpm-proxy": flag, "disable-auto-shutdown": flag,
		"key": keyFlag, "migration-key": keyFlag,
		"help": probe, "version": probe, "print-capabilities": probe, "print-states": probe, "print-profiles": probe,
	},
	SwtpmSetup: {
		"tpm-state": value, "tpmstate": value, "tpm": value, "swtpm_ioctl": value, "ownerpass": value, "srkpass": value,
		"config": value, "logfile": value, "vmid": value, "pcr-banks": value, "rsa-keysize": value, "runas": value,
		"write-ek-cert-files": value, "tcsd-system-ps-file": value, "profile": value, "profile-name": value,
		"profile-file": value, "profile-file-fd": value, "profile-remove-disabled": value,
		"tpm2": flag, "createek": flag, "create-ek-cert": flag, "create-platform-cert": flag, "create-spk": flag,
		"allow-signing": flag, "decryption": flag, "ecc": flag, "take-ownership": flag, "owner-well-known": flag,
		"srk-well-known": flag, "lock-nvram": flag, "display": flag, "overwrite": flag, "not-overwrite": flag,
		"reconfigure": flag,
		"keyfile":     keyFlag, "keyfile-fd": keyFlag, "pwdfile": keyFlag, "pwdfile-fd": keyFlag, "cipher": keyFlag,
		"help": probe, "version": probe, "print-capabilities": probe, "print-profiles": probe,
		"create-config-files": probe,
	},
}

// Short options, with a colon after those that take a value, and the long ones
// that matter among them.
var (
	short      = map[string]string{Swtpm: "p:f:c:dtr:hvn:M:m:", SwtpmSetup: "h?"}
	shortProbe = "hv?"
)

// Parse reads argv, argv[0] included. program is Swtpm or SwtpmSetup; what
// another program's words mean is not known, and comes back as a probe.
func Parse(program string, argv []string) Call {
	c := Call{Program: program, argv: slices.Clone(argv)}
	if long[program] == nil {
		c.Probe = true
		return c
	}
	words := c.argv
	if len(words) > 0 {
		words = words[1:]
	}
	for len(words) > 0 {
		a := c.next(words)
		words = words[len(a.words):]
		c.args = append(c.args, a)
		if a.end {
			for _, w := range words {
				c.args = append(c.args, arg{words: []string{w}})
			}
			break
		}
		c.note(a)
	}
	if c.StatePath == "" {
		c.Probe = true
	}
	return c
}

// next takes the first option, with its value, off words.
func (c *Call) next(words []string) arg {
	w := words[0]
	one := arg{words: words[:1]}
	two := func(a arg) arg {
		if len(words) == 1 {
			a.open = true
		} else {
			a.value, a.words = words[1], words[:2]
		}
		return a
	}
	switch {
	case w == "--":
		one.end = true
	case strings.HasPrefix(w, "--"):
		name, v, joined := strings.Cut(w[2:], "=")
		k, full := c.lookup(name)
		if full == "" {
			one.open = !joined && len(words) == 1
			return one
		}
		one.name, one.value, one.joined = full, v, joined
		if !joined && (k == value || k == keyFlag) {
			return two(one)
		}
	case len(w) > 1 && w[0] == '-':
		return c.shortOptions(w, one, two)
	}
	return one
}

// shortOptions reads a word of short options, of which the last may take the
// rest of the word or the next word as its value.
func (c *Call) shortOptions(w string, one arg, two func(arg) arg) arg {
	for i := 1; i < len(w); i++ {
		at := strings.IndexByte(short[c.Program], w[i])
		switch {
		case at < 0 || w[i] == ':':
			return one
		case strings.IndexByte(shortProbe, w[i]) >= 0:
			one.name = "help"
			return one
		case strings.HasPrefix(short[c.Program][at+1:], ":"):
			if i+1 < len(w) {
				return one
			}
			return two(one)
		}
	}
	return one
}

// lookup finds the long option that name stands for, as getopt_long does.
func (c *Call) lookup(name string) (kind, string) {
	options := long[c.Program]
	if k, ok := options[name]; ok {
		return k, name
	}
	var full string
	for o := range options {
		if name != "" && strings.HasPrefix(o, name) {
			if full != "" {
				return 0, "" // ambiguous: the program itself refuses it
			}
			full = o
		}
	}
	return options[full], full
}

func (c *Call) note(a arg) {
	k := long[c.Program][a.name]
	switch {
	case a.name == "":
	case k == probe:
		c.Probe = true
	case k == keyFlag:
		c.HasKey = c.HasKey || a.name != "cipher"
	case a.name == "tpm2":
		c.TPM2 = true
	case a.name == "config" && c.Program == SwtpmSetup:
		c.Config = a.value
	case a.name == "ctrl": // the last counts
		c.Socket = controlSocket(a.value)
	case a.name == "tpmstate" && c.Program == Swtpm:
		// swtpm prefers dir= over backend-uri= (swtpm/common.c, parse_tpmstate_options).
		if dir, ok := subOption(a.value, "dir"); ok {
			c.StatePath = clean(dir)
		} else if uri, ok := subOption(a.value, "backend-uri"); ok {
			c.StatePath = clean(uri)
		}
	case a.name == "tpmstate" || a.name == "tpm-state":
		c.StatePath = clean(a.value)
	}
}

// controlSocket reads the value of --ctrl (swtpm/common.c,
// parse_ctrlchannel_options): a descriptor would win over the path.
func controlSocket(options string) string {
	kind, _ := subOption(options, "type")
	at, _ := subOption(options, "path")
	_, fd := subOption(options, "fd")
	_, client := subOption(options, "clientfd")
	if kind != "unixio" || fd || client || !path.IsAbs(at) {
		return ""
	}
	return at
}

// subOption finds name= among swtpm's comma-separated sub-options; the first counts.
func subOption(s, name string) (string, bool) {
	for part := range strings.SplitSeq(s, ",") {
		if k, v, ok := strings.Cut(part, "="); ok && k == name {
			return v, true
		}
	}
	return "", false
}

// clean strips the scheme of swtpm's backends and makes the path comparable;
// a path that is not absolute is kept as it is.
func clean(p string) string {
	for _, scheme := range []string{"dir://", "file://"} {
		if rest, ok := strings.CutPrefix(p, scheme); ok {
			p = rest
			break
		}
	}
	if !path.IsAbs(p) {
		return p
	}
	return path.Clean(p)
}

// Mentions reports whether the number fd stands anywhere in the command line,
// where it may name a descriptor.
func (c Call) Mentions(fd int) bool {
	for _, w := range c.argv {
		for n := range strings.FieldsFuncSeq(w, func(r rune) bool { return r < '0' || r > '9' }) {
			if v, err := strconv.Atoi(n); err == nil && v == fd {
				return true
			}
		}
	}
	return false
}

// WithKeys gives the command line, argv[0] included, with the state key on
// descriptor stateFD and, for swtpm, the transfer key on transferFD, each 64
// hexadecimal digits. The caller's own keys are taken out, since swtpm prefers
// a key's file= to its fd= wherever they stand, and so is the log level, since
// from level 2 on swtpm logs every command with its authorisation values.
func (c Call) WithKeys(stateFD, transferFD int) []string {
	keys := []string{
		"--key", fmt.Sprintf("fd=%d,format=hex,mode=aes-256-cbc", stateFD),
		"--migration-key", fmt.Sprintf("fd=%d,format=hex,mode=aes-256-cbc", transferFD),
	}
	if c.Program == SwtpmSetup {
		keys = []string{"--keyfile-fd", strconv.Itoa(stateFD), "--cipher", "aes-256-cbc"}
	}
	return c.with(keys, func(a arg) []string {
		switch {
		case long[c.Program][a.name] == keyFlag:
			return nil
		case a.name == "log" && c.Program == Swtpm:
			return withoutLevel(a)
		}
		return a.words
	})
}

// WithConfig gives swtpm_setup's call with another configuration file.
func (c Call) WithConfig(file string) Call {
	return Parse(c.Program, c.with([]string{"--config", file}, func(a arg) []string {
		if a.name == "config" {
			return nil
		}
		return a.words
	}))
}

// Argv is the command line, argv[0] included.
func (c Call) Argv() []string { return slices.Clone(c.argv) }

// with gives the command line with more options, and with the others as keep
// leaves them.
func (c Call) with(more []string, keep func(arg) []string) []string {
	out := slices.Clone(c.argv[:min(1, len(c.argv))])
	for _, a := range c.args {
		kept := keep(a)
		if (a.end || a.open) && len(kept) > 0 {
			out, more = append(out, more...), nil
		}
		out = append(out, kept...)
	}
	return append(out, more...)
}

func withoutLevel(a arg) []string {
	parts := strings.Split(a.value, ",")
	kept := slices.DeleteFunc(slices.Clone(parts), func(p string) bool {
		return p == "level" || strings.HasPrefix(p, "level=")
	})
	switch {
	case len(kept) == len(parts):
		return a.words
	case len(kept) == 0:
		return nil
	case a.joined:
		return []string{"--log=" + strings.Join(kept, ",")}
	}
	return []string{a.words[0], strings.Join(kept, ",")}
}

// UUIDFromStatePath finds the VM whose vTPM libvirt keeps at p: root/UUID/tpm…,
// root being /var/lib/libvirt/swtpm as a rule.
func UUIDFromStatePath(root, p string) (uuid string, ok bool) {
	rest, ok := strings.CutPrefix(path.Clean(p), path.Clean(root)+"/")
	if !ok {
		return "", false
	}
	uuid, rest, _ = strings.Cut(rest, "/")
	if !domain.IsUUID(uuid) || !strings.HasPrefix(rest, "tpm") {
		return "", false
	}
	return uuid, true
}
