package swtpmargs

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	id  = "6f1c2d3e-0000-4a5b-8c6d-00000000000c"
	dir = "/var/lib/libvirt/swtpm/" + id + "/tpm2"
)

// The first lines are those that libvirt 9.0 and swtpm_setup 0.7.1 were seen to
// run; the later ones are libvirt 11's and swtpm 0.10's.
func TestParse(t *testing.T) {
	for _, c := range []struct {
		line  string
		path  string
		probe bool
		key   bool
		keyed string // with keys on 11 and 12; "" for probes
	}{
		{
			line:  "/usr/bin/swtpm socket --ctrl type=unixio,path=/run/libvirt/qemu/swtpm/1-live-swtpm.sock,mode=0600 --tpmstate dir=" + dir + ",mode=0600 --log file=/var/log/swtpm/libvirt/qemu/live-swtpm.log --terminate --tpm2",
			path:  dir,
			keyed: "/usr/bin/swtpm socket --ctrl type=unixio,path=/run/libvirt/qemu/swtpm/1-live-swtpm.sock,mode=0600 --tpmstate dir=" + dir + ",mode=0600 --log file=/var/log/swtpm/libvirt/qemu/live-swtpm.log --terminate --tpm2 KEYS",
		},
		{
			line: "swtpm socket --tpmstate dir=/s --tpm2 --key pwdfd=31,mode=aes-256-cbc --migration-key pwdfd=33,mode=aes-256-cbc --terminate",
			path: "/s", key: true,
			keyed: "swtpm socket --tpmstate dir=/s --tpm2 --terminate KEYS",
		},
		{
			line:  "swtpm_setup --tpm2 --tpm-state " + dir + " --vmid live:" + id + " --logfile /l --createek --create-ek-cert --create-platform-cert --lock-nvram --not-overwrite",
			path:  dir,
			keyed: "swtpm_setup --tpm2 --tpm-state " + dir + " --vmid live:" + id + " --logfile /l --createek --create-ek-cert --create-platform-cert --lock-nvram --not-overwrite KEYS",
		},
		{line: "swtpm_setup --tpm2 --tpm-state " + dir + " --overwrite", path: dir, keyed: "swtpm_setup --tpm2 --tpm-state " + dir + " --overwrite KEYS"},
		{line: "swtpm_setup --print-capabilities", probe: true},
		{line: "swtpm_setup --create-config-files skip-if-exist", probe: true},
		{line: "/x/swtpm socket --print-capabilities --log file=/l", probe: true},
		{line: "/x/swtpm socket --print-states --tpmstate backend-uri=dir://" + dir + " --tpm2 --log file=/l", path: dir, probe: true},
		{
			line: "/x/swtpm socket --flags not-need-init,startup-clear --tpmstate backend-uri=dir://" + dir + " --pid file=/tmp/p --tpm2 --key fd=7,mode=aes-256-cbc --log file=/l --server type=tcp,fd=8 --ctrl type=unixio,clientfd=5",
			path: dir, key: true,
			keyed: "/x/swtpm socket --flags not-need-init,startup-clear --tpmstate backend-uri=dir://" + dir + " --pid file=/tmp/p --tpm2 --log file=/l --server type=tcp,fd=8 --ctrl type=unixio,clientfd=5 KEYS",
		},
		{line: "swtpm --version", probe: true},
		{line: "swtpm -v", probe: true},
		{line: "swtpm socket -h", probe: true},
		{line: "swtpm socket --tpm2", probe: true}, // TPM_PATH, or an error
		{line: "swtpm", probe: true},
		{line: "swtpm_setup", probe: true},
		{line: "swtpm_setup --print-profiles --tpm2", probe: true},

		{
			line:  "swtpm socket --ctrl type=unixio,path=/c,mode=0600 --tpmstate dir=/s,mode=0600,lock,fsync --log file=/l,level=5,truncate --terminate --migration release-lock-outgoing,incoming --tpm2",
			path:  "/s",
			keyed: "swtpm socket --ctrl type=unixio,path=/c,mode=0600 --tpmstate dir=/s,mode=0600,lock,fsync --log file=/l,truncate --terminate --migration release-lock-outgoing,incoming --tpm2 KEYS",
		},
		{
			line:  "swtpm socket --tpmstate backend-uri=file:///dev/vg/tpm,lock --tpm2 --profile name=default-v1 --print-nothing-yet x",
			path:  "/dev/vg/tpm",
			keyed: "swtpm socket --tpmstate backend-uri=file:///dev/vg/tpm,lock --tpm2 --profile name=default-v1 --print-nothing-yet x KEYS",
		},
		{
			line:  "swtpm_setup --tpm2 --tpm-state dir:///s/ --reconfigure --pcr-banks sha384 --profile-name custom:a --profile-remove-disabled fips-host",
			path:  "/s",
			keyed: "swtpm_setup --tpm2 --tpm-state dir:///s/ --reconfigure --pcr-banks sha384 --profile-name custom:a --profile-remove-disabled fips-host KEYS",
		},
		{
			line: "swtpm_setup --tpmstate=/s --keyfile /k --keyfile-fd=4 --pwdfile /p --pwdfile-fd 5 --cipher aes-128-cbc --tpm2",
			path: "/s", key: true,
			keyed: "swtpm_setup --tpmstate=/s --tpm2 KEYS",
		},
		{line: "swtpm_setup --tpm-state /s --cipher aes-128-cbc", path: "/s", keyed: "swtpm_setup --tpm-state /s KEYS"},
		{line: "swtpm chardev --vtpm-proxy --tpmstate=dir=/s --tpm2", path: "/s", keyed: "swtpm chardev --vtpm-proxy --tpmstate=dir=/s --tpm2 KEYS"},
		{line: "swtpm cuse -n vtpm0 --tpmstate dir=/s", path: "/s", keyed: "swtpm cuse -n vtpm0 --tpmstate dir=/s KEYS"},

		// What getopt_long(3) allows besides.
		{line: "swtpm socket --tpms dir=/s --ke file=/k --key=file=/k,mode=aes-cbc --migration-key=file=/m", path: "/s", key: true, keyed: "swtpm socket --tpms dir=/s KEYS"},
		{line: "swtpm socket --tpmstate dir=/a --tpmstate dir=/b", path: "/b", keyed: "swtpm socket --tpmstate dir=/a --tpmstate dir=/b KEYS"},
		{line: "swtpm socket --tpmstate backend-uri=dir:///a,dir=/b", path: "/b", keyed: "swtpm socket --tpmstate backend-uri=dir:///a,dir=/b KEYS"},
		{line: "swtpm socket --tpmstate dir=/s -- --key file=/k", path: "/s", keyed: "swtpm socket --tpmstate dir=/s KEYS -- --key file=/k"},
		{line: "swtpm socket --tpmstate dir=/s --pid --print-capabilities", path: "/s", keyed: "swtpm socket --tpmstate dir=/s --pid --print-capabilities KEYS"},
		{line: "swtpm socket --tpmstate dir=/s -r --version -dt", path: "/s", keyed: "swtpm socket --tpmstate dir=/s -r --version -dt KEYS"},
		{line: "swtpm socket --tpmstate dir=/s -dh", path: "/s", probe: true},
		{line: "swtpm socket --tpmstate dir=/s --log level=20 --log=level=3,file=/l", path: "/s", keyed: "swtpm socket --tpmstate dir=/s --log=file=/l KEYS"},
		{line: "swtpm socket --tpmstate dir=/a/../s/./t//", path: "/s/t", keyed: "swtpm socket --tpmstate dir=/a/../s/./t// KEYS"},
		{line: "swtpm socket --tpmstate dir=s", path: "s", keyed: "swtpm socket --tpmstate dir=s KEYS"},
		{line: "swtpm socket --tpmstate dir=/s --pid", path: "/s", keyed: "swtpm socket --tpmstate dir=/s KEYS --pid"},
		{line: "swtpm socket --tpmstate dir=/s --new", path: "/s", keyed: "swtpm socket --tpmstate dir=/s KEYS --new"},
		{line: "swtpm socket --tpmstate dir=/s -r", path: "/s", keyed: "swtpm socket --tpmstate dir=/s KEYS -r"},
		{line: "swtpm socket --tpmstate dir=/s --key", path: "/s", key: true, keyed: "swtpm socket --tpmstate dir=/s KEYS"},
	} {
		argv := strings.Fields(c.line)
		program := argv[0][strings.LastIndexByte(argv[0], '/')+1:]
		keys := "--key fd=11,format=hex,mode=aes-256-cbc --migration-key fd=12,format=hex,mode=aes-256-cbc"
		if program == SwtpmSetup {
			keys = "--keyfile-fd 11 --cipher aes-256-cbc"
		}
		before := slices.Clone(argv)
		got := Parse(program, argv)
		if got.StatePath != c.path || got.Probe != c.probe || got.HasKey != c.key {
			t.Errorf("%s\n\tpath %q, probe %t, key %t", c.line, got.StatePath, got.Probe, got.HasKey)
		}
		if c.keyed != "" {
			if d := cmp.Diff(strings.Replace(c.keyed, "KEYS", keys, 1), strings.Join(got.WithKeys(11, 12), " ")); d != "" {
				t.Errorf("%s\n%s", c.line, d)
			}
		}
		if !slices.Equal(argv, before) {
			t.Errorf("%s\n\tthe caller's arguments have changed", c.line)
		}
	}
	if c := Parse("qemu-system-x86_64", []string{"qemu-system-x86_64", "--tpmstate", "dir=/s"}); !c.Probe {
		t.Error("another program's command line is taken for swtpm's")
	}
}

func TestSocket(t *testing.T) {
	for line, want := range map[string]string{
		"swtpm socket --ctrl type=unixio,path=/run/libvirt/qemu/swtpm/1-live-swtpm.sock,mode=0600 --tpmstate dir=/s --tpm2": "/run/libvirt/qemu/swtpm/1-live-swtpm.sock",
		"swtpm socket --ctrl=path=/c,type=unixio --tpmstate dir=/s":                                                         "/c",
		"swtpm socket --ctrl type=unixio,path=/a --ctrl type=unixio,path=/b":                                                "/b",
		"swtpm socket --ctrl type=unixio,path=/a --ctrl type=unixio,fd=7":                                                   "",
		"swtpm socket --ctrl type=unixio,path=/a,fd=7":                                                                      "",
		"swtpm socket --ctrl type=unixio,clientfd=5,path=/a":                                                                "",
		"swtpm socket --ctrl type=unixio,path=a":                                                                            "",
		"swtpm socket --ctrl type=unixio":                                                                                   "",
		"swtpm socket --ctrl type=tcp,port=1,path=/a":                                                                       "",
		"swtpm socket --server type=unixio,path=/a":                                                                         "",
		"swtpm socket --ctrl":                                                       "",
		"swtpm socket -- --ctrl type=unixio,path=/a":                                "",
		"swtpm_setup --tpm-state /s --tpm2 --logfile /l --ctrl type=unixio,path=/a": "",
	} {
		program := strings.Fields(line)[0]
		if got := Parse(program, strings.Fields(line)).Socket; got != want {
			t.Errorf("%s: %q, not %q", line, got, want)
		}
	}
}

func TestMentions(t *testing.T) {
	c := Parse(Swtpm, strings.Fields("swtpm socket --server type=tcp,fd=8 --pid fd=010 --ctrl clientfd=5 --tpmstate dir=/v/tpm2/7a"))
	for fd, want := range map[int]bool{2: true, 5: true, 7: true, 8: true, 10: true, 3: false, 80: false, 1: false} {
		if c.Mentions(fd) != want {
			t.Errorf("Mentions(%d) = %t", fd, !want)
		}
	}
}

func TestUUIDFromStatePath(t *testing.T) {
	root := "/var/lib/libvirt/swtpm"
	for p, want := range map[string]string{
		dir:                                 id,
		root + "/" + id + "/tpm1.2":         id,
		root + "/" + id + "/tpm2/":          id,
		root + "/./" + id + "/x/../tpm2":    id,
		root + "/" + id:                     "",
		root + "/" + id + "/other":          "",
		root + "/" + id + "x/tpm2":          "",
		root + "/../swtpm2/" + id + "/tpm2": "",
		"/srv" + dir:                        "",
		"":                                  "",
		"tpm2":                              "",
		root + "/" + strings.ToUpper(id) + "/tpm2": "",
	} {
		got, ok := UUIDFromStatePath(root+"/", p)
		if got != want || ok != (want != "") {
			t.Errorf("%s: %q, %t", p, got, ok)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"swtpm\x00socket\x00--tpmstate\x00dir=/s\x00--key\x00file=/k\x00--log\x00level=2",
		"swtpm_setup\x00--tpm-state\x00/s\x00--keyfile=/k\x00--cipher\x00aes-128-cbc\x00--",
		"swtpm\x00-dtr\x00--\x00--ke=\x00-\x00--=\x00---",
		"\x00--tpm", "", "swtpm", "swtpm\x00--\x00--key", "swtpm\x00--log=level",
	} {
		f.Add(s, true)
		f.Add(s, false)
	}
	f.Fuzz(func(t *testing.T, line string, setup bool) {
		argv := strings.Split(line, "\x00")
		program, key, other := Swtpm, "key", "migration-key"
		if setup {
			program, key, other = SwtpmSetup, "keyfile-fd", "cipher"
		}
		keyed := Parse(program, argv).WithKeys(4321, 8765)
		count := map[string]int{}
		for _, a := range Parse(program, keyed).args {
			if long[program][a.name] == keyFlag {
				count[a.name]++
				if a.name == key && !strings.Contains(a.value, "4321") {
					t.Fatalf("%q: the key is %q", keyed, a.value)
				}
			}
		}
		if len(count) != 2 || count[key] != 1 || count[other] != 1 {
			t.Fatalf("%q: keys %v", keyed, count)
		}
		if keyed[0] != argv[0] {
			t.Fatalf("argv[0] is %q", keyed[0])
		}
	})
}
