package daemon

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// diskFault is what a file system answers.
type diskFault struct {
	errno string
	words string   // that the error has to have
	calls []string // that answer so
}

var diskFaults = []diskFault{
	{"ENOSPC", "no space left on device", []string{"openat", "mkdirat", "write", "pwrite64", "renameat", "fsync"}},
	{"EROFS", "read-only file system", []string{"openat", "mkdirat", "renameat", "unlinkat"}},
	{"EIO", "input/output error", []string{"openat", "read", "pread64", "write", "pwrite64", "renameat", "unlinkat", "fsync"}},
}

// allFaults: make faults, and make test, leave none out.
var allFaults = os.Getenv("VIRT_TRUST_FAULTS") == "all"

// steps of the disk: each call that touches what lies below the house's root,
// with those that only read where the fault says so.
func (f diskFault) steps(h *house, op string) (all []cutAt) {
	h.t.Helper()
	trace := filepath.Join(h.t.TempDir(), "trace")
	if words, err := h.inChild(op, "--seccomp-bpf", "-y", "-o", trace, "-e", "signal=none", "-e", "trace="+strings.Join(f.calls, ",")); err != nil {
		h.t.Fatalf("%s: %v: %s", op, err, words)
	}
	main, count := "", map[string]int{}
	b, err := os.ReadFile(trace)
	if err != nil {
		h.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		pid, rest, _ := strings.Cut(line, " ")
		call, args, ok := strings.Cut(strings.TrimSpace(rest), "(")
		if main == "" {
			main = pid
		}
		if pid != main || !ok {
			continue
		}
		count[call]++
		writes := call != "openat" || strings.Contains(args, "O_CREAT") || strings.Contains(args, "O_RDWR") || strings.Contains(args, "O_WRONLY")
		ours := strings.Contains(args, h.root) && !strings.Contains(args, "tpm.json") && !strings.Contains(args, "decisions.jsonl")
		if ours && (writes || f.errno == "EIO") {
			all = append(all, cutAt{call, count[call]})
		}
	}
	return all
}

// A disk that is full, read-only or broken at any step of any operation, for
// one call or from then on: the error says so, nothing is lost or started
// wrongly, and when the disk is well again so is everything.
func TestDiskFaults(t *testing.T) {
	makings(t)
	var cases, refused atomic.Int64
	t.Cleanup(func() {
		figures(t, "disk full, read-only, broken: %d cases, %d with an error, 0 vTPMs lost, 0 wrongly started, 0 refused without a way back", cases.Load(), refused.Load())
	})
	for _, tt := range scenes {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h, f, before := tt.before(t)
			for _, fault := range diskFaults {
				os.RemoveAll(h.root)
				copyTree(t, before, h.root)
				steps := fault.steps(h, tt.op)
				for i, at := range steps {
					if i%(len(steps)/3+1) != 0 && !allFaults {
						continue
					}
					lasting := ""
					if i%2 == 1 && at.call != "openat" && at.call != "read" && at.call != "write" { // which are not of this disk alone
						lasting = "+" // until somebody makes room
					}
					os.RemoveAll(h.root)
					copyTree(t, before, h.root)
					words, err := h.inChild(tt.op, "--seccomp-bpf", "-o", "/dev/null", "-e", "trace="+at.call,
						"-e", fmt.Sprintf("inject=%s:error=%s:when=%d%s", at.call, fault.errno, at.n, lasting))
					var exit *exec.ExitError
					if errors.As(err, &exit) && exit.ExitCode() == 2 && strings.Contains(words, "netpollBreak") {
						continue // it hit a call of Go's runtime, which counts like ours and is not always there
					}
					cases.Add(1)
					switch {
					case err == nil:
					case !errors.As(err, &exit) || exit.ExitCode() != 1:
						t.Errorf("it ends with %v: %s", err, words)
					case strings.Count(words, "\n") > 2 || !strings.Contains(words, fault.words):
						t.Errorf("it says %q, without %q", words, fault.words)
					default:
						refused.Add(1)
					}
					h.boot()
					if tt.op == "prepare" || tt.op == "stop" {
						h.startsItself(f)
					}
					tt.check(h, f)
					h.g.Close()
					if t.Failed() {
						t.Fatalf("%s at step %d, %v%s", fault.errno, i, at, lasting)
					}
				}
			}
		})
	}
}
