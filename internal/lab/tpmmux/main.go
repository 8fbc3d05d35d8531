// Command tpmmux lets many clients use a swtpm, which serves one at a time:
// it accepts on one unix socket and forwards whole commands over its single
// connection to the other. It does not keep clients' objects apart, as
// /dev/tpmrm0 does: a client that leaves handles behind fills the TPM, and a
// test shall notice. A file beside its socket, named like it with .delay, makes
// the TPM slow: each command takes as long as it says (100ms) and more. When each
// of these began and ended is noted in another, .log, in microseconds since 1970.
package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"
)

func main() {
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "tpmmux:", err)
		os.Exit(1)
	}
}

func run(listen, swtpm string) error {
	var tpm net.Conn
	var err error
	for range 250 {
		if tpm, err = net.Dial("unix", swtpm); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	os.Remove(listen)
	l, err := net.Listen("unix", listen)
	if err != nil {
		return err
	}
	// Like /dev/tpmrm0 in Debian: root and nobody else.
	if err := os.Chmod(listen, 0o600); err != nil {
		return err
	}
	if conn, err := net.Dial("unixgram", os.Getenv("NOTIFY_SOCKET")); err == nil {
		conn.Write([]byte("READY=1"))
		conn.Close()
	}
	var mu sync.Mutex
	for {
		client, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer client.Close()
			for {
				command, err := message(client)
				if err != nil {
					return
				}
				mu.Lock()
				began, by := time.Now(), delay(listen+".delay")
				time.Sleep(by)
				_, err = tpm.Write(command)
				var response []byte
				if err == nil {
					response, err = message(tpm)
				}
				if by > 0 {
					note(listen+".log", began, time.Now())
				}
				mu.Unlock()
				if err != nil {
					fmt.Fprintln(os.Stderr, "tpmmux: swtpm:", err)
					os.Exit(1)
				}
				if _, err := client.Write(response); err != nil {
					return
				}
			}
		}()
	}
}

// note adds a line to a file.
func note(path string, began, ended time.Time) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return
	}
	defer f.Close()
	fmt.Fprintln(f, began.UnixMicro(), ended.UnixMicro())
}

// delay is what the file says, or nothing.
func delay(path string) time.Duration {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	d, _ := time.ParseDuration(strings.TrimSpace(string(b)))
	return d
}

// message reads one command or response: tag (2 bytes), size (4 bytes), rest.
// TPM 2.0 Library, Part 1, 18.
func message(r io.Reader) ([]byte, error) {
	header := make([]byte, 10)
	if _, err := io.ReadFull(r, header); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(header[2:])
	if size < 10 || size > 1<<16 {
		return nil, fmt.Errorf("message of %d bytes", size)
	}
	b := append(header, make([]byte, size-10)...)
	_, err := io.ReadFull(r, b[10:])
	return b, err
}
