// Command virt-trust-signer holds the key of a Verifier's CA in a TPM. See
// virt-trust-signer(8).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"os/user"
	"strconv"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"

	"virt-trust/internal/platform/journal"
	"virt-trust/internal/verifier/signer"
)

func main() {
	o := signer.Options{Log: journal.New("virt-trust-signer").WithContext(context.Background())}
	flag.StringVar(&o.Device, "tpm", "/dev/tpmrm0", "the TPM")
	flag.StringVar(&o.Key, "key", "/var/lib/virt-trust-signer/ca-key.pem", "TSS2 key file")
	flag.StringVar(&o.Certificate, "certificate", "/var/lib/virt-trust-signer/ca.pem", "the CA's certificate")
	verifier := flag.String("user", "virt-trust-verifier", "who may ask for signatures, beside root")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: virt-trust-signer [options] [init NAME]; see virt-trust-signer(8)")
	}
	flag.Parse()
	var err error
	switch {
	case flag.NArg() == 2 && flag.Arg(0) == "init":
		err = signer.Init(o, flag.Arg(1), time.Now())
	case flag.NArg() == 0:
		err = serve(o, *verifier)
	default:
		flag.Usage()
		os.Exit(2)
	}
	if err != nil {
		o.Log.Fatal(err)
	}
}

func serve(o signer.Options, name string) error {
	u, err := user.Lookup(name)
	if err != nil {
		return err
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return err
	}
	o.UID = uint32(uid)
	ls, err := activation.Listeners()
	if err != nil || len(ls) != 1 || ls[0] == nil {
		return errors.Join(errors.New("virt-trust-signer is started by its socket: systemctl enable --now virt-trust-signer.socket"), err)
	}
	s, err := signer.Open(o)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return s.Serve(ctx, ls[0])
}
