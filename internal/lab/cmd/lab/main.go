// Command lab boots test hosts for developers, and for `make demo` and
// `make bench`.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"virt-trust/internal/lab"
)

const usage = `usage: lab [-plain] [-share DIR] run [COMMAND [ARG...]]
       lab demo
       lab bench [-pairs N] [-vms N]
       lab corpus [-vms N] [-entries N] [-rounds N] DIR

run boots a test host, installs dist/virt-trust_*.deb (unless -plain), runs the
command there, or a shell, and ends the host. corpus writes evidence for
benchmarks of verifiers. As root.
`

func main() {
	plain := flag.Bool("plain", false, "do not install virt-trust")
	share := flag.String("share", "", "a folder of this machine, /share on the host")
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	flag.Parse()
	s := new(session)
	os.Exit(s.do(func() int {
		switch flag.Arg(0) {
		case "run":
			return run(s, *plain, *share, flag.Args()[1:])
		case "demo":
			demo(s)
		case "corpus":
			corpus(s, flag.Args()[1:])
		case "bench":
			bench(s, flag.Args()[1:])
		default:
			flag.Usage()
			return 2
		}
		return 0
	}))
}

func run(s *session, plain bool, share string, command []string) int {
	options := lab.HostOptions{Name: "lab", Share: share}
	if !plain {
		options.Deb = s.deb()
	}
	h := lab.NewHost(s, options)
	if len(command) == 0 {
		command = []string{"bash", "--login"}
	}
	cmd := h.Enter(command...)
	if err := cmd.Run(); cmd.ProcessState == nil {
		s.Fatalf("%v", err)
	}
	return cmd.ProcessState.ExitCode()
}

// session is the lab.T of a command.
type session struct {
	once    sync.Once
	mu      sync.Mutex
	cleanup []func()
}

// failure is what Fatalf panics with.
type failure string

// do runs a command's body, cleans up and gives its exit code.
func (s *session) do(body func() int) (code int) {
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		<-interrupted
		s.end()
		os.Exit(130)
	}()
	defer s.end()
	defer func() {
		switch f := recover().(type) {
		case nil:
		case failure:
			fmt.Fprintln(os.Stderr, "lab:", strings.TrimSpace(string(f)))
			code = 1
		default:
			s.end()
			panic(f)
		}
	}()
	return body()
}

func (s *session) end() {
	s.once.Do(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for i := len(s.cleanup) - 1; i >= 0; i-- {
			s.cleanup[i]()
		}
	})
}

func (s *session) deb() string {
	deb, err := lab.Deb()
	if err != nil {
		s.Fatalf("%v", err)
	}
	return deb
}

func (s *session) Helper()                           {}
func (s *session) Name() string                      { return "lab" }
func (s *session) Failed() bool                      { return false }
func (s *session) Logf(format string, args ...any)   { fmt.Fprintf(os.Stderr, format+"\n", args...) }
func (s *session) Fatalf(format string, args ...any) { panic(failure(fmt.Sprintf(format, args...))) }

func (s *session) Cleanup(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cleanup = append(s.cleanup, f)
}
