// Command guest is the whole user space of a lab guest: its init. It obeys
// one-line commands from the kernel command line (vt.do=seal:TEXT,unseal) and
// from the serial console (seal TEXT), and answers each with one line that
// begins with "VT: ".
//
// What it keeps in its vTPM is masked (mask), so that no disk of the host
// holds those bytes unless the vTPM's state is there in the clear: not the
// domain XML, not the console's log.
package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"golang.org/x/sys/unix"
)

func main() {
	unix.Mount("dev", "/dev", "devtmpfs", 0, "")
	unix.Mount("proc", "/proc", "proc", 0, "")
	unix.Mount("sys", "/sys", "sysfs", 0, "")
	console, err := os.OpenFile("/dev/ttyS0", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		panic(err) // the kernel says so on its console
	}
	quietTTY(console)
	say := func(format string, args ...any) {
		fmt.Fprintf(console, "VT: "+format+"\n", args...)
	}
	for _, module := range []string{"evdev", "button"} {
		if err := load("/modules/" + module + ".ko"); err != nil {
			say("module %s: %v", module, err)
		}
	}
	go powerButton(say)

	cmdline, _ := os.ReadFile("/proc/cmdline")
	for _, word := range strings.Fields(string(cmdline)) {
		if todo, ok := strings.CutPrefix(word, "vt.do="); ok {
			for _, do := range strings.Split(todo, ",") {
				verb, arg, _ := strings.Cut(do, ":")
				say("%s", obey(verb, arg))
			}
		}
	}
	say("ready")
	for {
		for lines := bufio.NewScanner(console); lines.Scan(); {
			verb, arg, _ := strings.Cut(strings.TrimSpace(lines.Text()), " ")
			if verb != "" {
				say("%s", obey(verb, arg))
			}
		}
		time.Sleep(100 * time.Millisecond) // a hang-up of the line
	}
}

// quietTTY turns the console's echo off.
func quietTTY(console *os.File) {
	if t, err := unix.IoctlGetTermios(int(console.Fd()), unix.TCGETS); err == nil {
		t.Lflag &^= unix.ECHO
		unix.IoctlSetTermios(int(console.Fd()), unix.TCSETS, t)
	}
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

// powerButton powers off when the button is pressed (linux/input.h: struct
// input_event is two longs of time, type, code, value; EV_KEY is 1, KEY_POWER
// 116).
func powerButton(say func(string, ...any)) {
	events, _ := filepath.Glob("/dev/input/event*")
	for _, path := range events {
		go func() {
			f, err := os.Open(path)
			if err != nil {
				return
			}
			event := make([]byte, 24)
			for {
				if _, err := f.Read(event); err != nil {
					return
				}
				if binary.LittleEndian.Uint16(event[16:]) == 1 && binary.LittleEndian.Uint16(event[18:]) == 116 && event[20] == 1 {
					say("power button")
					unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
				}
			}
		}()
	}
}

// work is what goes on between the commands load and rest.
var work worker

// obey does one command and gives the answer.
func obey(verb, arg string) string {
	switch verb {
	case "ping", "idle":
		return "pong " + arg
	case "poweroff":
		unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "reboot":
		unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "crash":
		os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	}
	var text string
	err := withTPM(func(tpm transport.TPM) (err error) {
		switch verb {
		case "seal":
			err = seal(tpm, arg)
			text = "sealed " + arg
		case "unseal":
			var secret string
			secret, err = unseal(tpm)
			text = "unsealed " + secret
		case "write":
			err = write(tpm, arg)
			text = "wrote " + arg
		case "read":
			var data string
			data, err = read(tpm)
			text = "read " + data
		case "churn":
			var n int
			n, err = strconv.Atoi(arg)
			for i := 0; i < n && err == nil; i++ {
				err = write(tpm, fmt.Sprintf("churn %d", i))
			}
			text = "churned " + arg
		case "extend":
			var pcr int
			if pcr, err = strconv.Atoi(arg); err == nil {
				err = extend(tpm, pcr)
			}
			text = "extended " + arg
		case "load":
			work.load()
			text = "loaded"
		case "rest":
			var n int
			n, err = work.rest()
			text = fmt.Sprintf("rested %d", n)
		case "pcrs":
			text, err = pcrs(tpm)
			text = "pcrs " + text
		case "ek":
			text, err = ek(tpm)
		case "ekcert":
			text, err = certificate(tpm)
		case "ak":
			text, err = ak(tpm)
		default:
			err = errors.New("unknown command")
		}
		return err
	})
	if err != nil {
		return fmt.Sprintf("%s failed: %v", verb, err)
	}
	return text
}

func withTPM(do func(transport.TPM) error) error {
	tpm, err := linuxtpm.Open("/dev/tpmrm0")
	if err != nil {
		return err
	}
	defer tpm.Close()
	return do(tpm)
}

// Where the guest keeps its things.
const (
	sealedHandle = tpm2.TPMHandle(0x81000100)
	ekHandle     = tpm2.TPMHandle(0x81010001) // TCG EK Credential Profile 2.6, 2.2.1.1: RSA 2048
	nvIndex      = tpm2.TPMHandle(0x01500100)
	nvSize       = 64
)

// mask makes text unlike anything else on a disk; it is its own inverse.
func mask(text []byte) []byte {
	out := make([]byte, len(text))
	for i, b := range text {
		out[i] = b ^ 0xa5
	}
	return out
}

// selection is what BitLocker and its like bind to: the state of Secure Boot,
// and a PCR that a command can extend.
var selection = tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
	Hash:      tpm2.TPMAlgSHA256,
	PCRSelect: tpm2.PCClientCompatible.PCRs(7, 12),
}}}

// seal keeps text in a persistent object that opens only with the PCRs of now.
func seal(tpm transport.TPM, text string) error {
	trial, closeTrial, err := tpm2.PolicySession(tpm, tpm2.TPMAlgSHA256, 16, tpm2.Trial())
	if err != nil {
		return err
	}
	defer closeTrial()
	if _, err := (tpm2.PolicyPCR{PolicySession: trial.Handle(), Pcrs: selection}).Execute(tpm); err != nil {
		return err
	}
	policy, err := tpm2.PolicyGetDigest{PolicySession: trial.Handle()}.Execute(tpm)
	if err != nil {
		return err
	}
	srk, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHOwner,
		InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
	}.Execute(tpm)
	if err != nil {
		return err
	}
	defer tpm2.FlushContext{FlushHandle: srk.ObjectHandle}.Execute(tpm)
	parent := tpm2.NamedHandle{Handle: srk.ObjectHandle, Name: srk.Name}
	created, err := tpm2.Create{
		ParentHandle: parent,
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: mask([]byte(text))}),
		}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type:             tpm2.TPMAlgKeyedHash,
			NameAlg:          tpm2.TPMAlgSHA256,
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true},
			AuthPolicy:       policy.PolicyDigest,
		}),
	}.Execute(tpm)
	if err != nil {
		return err
	}
	loaded, err := tpm2.Load{ParentHandle: parent, InPrivate: created.OutPrivate, InPublic: created.OutPublic}.Execute(tpm)
	if err != nil {
		return err
	}
	defer tpm2.FlushContext{FlushHandle: loaded.ObjectHandle}.Execute(tpm)
	if old, err := (tpm2.ReadPublic{ObjectHandle: sealedHandle}).Execute(tpm); err == nil {
		_, err := tpm2.EvictControl{
			Auth:             tpm2.TPMRHOwner,
			ObjectHandle:     tpm2.NamedHandle{Handle: sealedHandle, Name: old.Name},
			PersistentHandle: sealedHandle,
		}.Execute(tpm)
		if err != nil {
			return err
		}
	}
	_, err = tpm2.EvictControl{
		Auth:             tpm2.TPMRHOwner,
		ObjectHandle:     tpm2.NamedHandle{Handle: loaded.ObjectHandle, Name: loaded.Name},
		PersistentHandle: sealedHandle,
	}.Execute(tpm)
	return err
}

func unseal(tpm transport.TPM) (string, error) {
	public, err := tpm2.ReadPublic{ObjectHandle: sealedHandle}.Execute(tpm)
	if err != nil {
		return "", err
	}
	pcrs := func(tpm transport.TPM, session tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
		_, err := tpm2.PolicyPCR{PolicySession: session, Pcrs: selection}.Execute(tpm)
		return err
	}
	r, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{
		Handle: sealedHandle,
		Name:   public.Name,
		Auth:   tpm2.Policy(tpm2.TPMAlgSHA256, 16, pcrs),
	}}.Execute(tpm)
	if err != nil {
		return "", err
	}
	return string(mask(r.OutData.Buffer)), nil
}

// write puts text into an NV index, at most nvSize bytes of it.
func write(tpm transport.TPM, text string) error {
	index, err := nv(tpm)
	if err != nil {
		_, err = tpm2.NVDefineSpace{
			AuthHandle: tpm2.TPMRHOwner,
			PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
				NVIndex:    nvIndex,
				NameAlg:    tpm2.TPMAlgSHA256,
				Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, NoDA: true},
				DataSize:   nvSize,
			}),
		}.Execute(tpm)
		if err != nil {
			return err
		}
		if index, err = nv(tpm); err != nil {
			return err
		}
	}
	data := make([]byte, nvSize)
	copy(data, text)
	_, err = tpm2.NVWrite{AuthHandle: tpm2.TPMRHOwner, NVIndex: index, Data: tpm2.TPM2BMaxNVBuffer{Buffer: mask(data)}}.Execute(tpm)
	return err
}

func read(tpm transport.TPM) (string, error) {
	index, err := nv(tpm)
	if err != nil {
		return "", err
	}
	r, err := tpm2.NVRead{AuthHandle: tpm2.TPMRHOwner, NVIndex: index, Size: nvSize}.Execute(tpm)
	if err != nil {
		return "", err
	}
	return string(bytes.TrimRight(mask(r.Data.Buffer), "\x00")), nil
}

func nv(tpm transport.TPM) (tpm2.NamedHandle, error) {
	public, err := tpm2.NVReadPublic{NVIndex: nvIndex}.Execute(tpm)
	if err != nil {
		return tpm2.NamedHandle{}, err
	}
	return tpm2.NamedHandle{Handle: nvIndex, Name: public.NVName}, nil
}

func extend(tpm transport.TPM, pcr int) error {
	digest := sha256.Sum256([]byte("virt-trust lab"))
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{
			HashAlg: tpm2.TPMAlgSHA256,
			Digest:  digest[:],
		}}},
	}.Execute(tpm)
	return err
}

// ek tells one vTPM from another.
func ek(tpm transport.TPM) (string, error) {
	public, err := tpm2.ReadPublic{ObjectHandle: ekHandle}.Execute(tpm)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("ek %x", public.Name.Buffer), nil
}

// certificateIndex has the certificate of the RSA EK (TCG EK Credential Profile
// 2.6, 2.2.1.4).
const certificateIndex = tpm2.TPMHandle(0x01c00002)

// certificate reads the EK's certificate out of the vTPM's NV memory, and gives
// its digest: the console is no line for thousands of digits.
func certificate(tpm transport.TPM) (string, error) {
	public, err := tpm2.NVReadPublic{NVIndex: certificateIndex}.Execute(tpm)
	if err != nil {
		return "", err
	}
	p, err := public.NVPublic.Contents()
	if err != nil {
		return "", err
	}
	index := tpm2.NamedHandle{Handle: certificateIndex, Name: public.NVName}
	var der []byte
	for len(der) < int(p.DataSize) {
		r, err := tpm2.NVRead{
			AuthHandle: tpm2.TPMRHOwner, NVIndex: index,
			Size: min(512, p.DataSize-uint16(len(der))), Offset: uint16(len(der)),
		}.Execute(tpm)
		if err != nil {
			return "", err
		}
		der = append(der, r.Data.Buffer...)
	}
	issuer := ""
	if c, err := x509.ParseCertificate(der); err == nil {
		issuer = c.Issuer.CommonName
	}
	return fmt.Sprintf("ekcert %x by %s", sha256.Sum256(der), issuer), nil
}

// akHandle is where a vTPM has the AK of its manufacture.
const akHandle = tpm2.TPMHandle(0x8180ff01)

func ak(tpm transport.TPM) (string, error) {
	public, err := tpm2.ReadPublic{ObjectHandle: akHandle}.Execute(tpm)
	if err != nil {
		return "", err
	}
	// The guest's owner cannot take it away.
	_, err = tpm2.EvictControl{
		Auth: tpm2.TPMRHOwner, ObjectHandle: tpm2.NamedHandle{Handle: akHandle, Name: public.Name}, PersistentHandle: akHandle,
	}.Execute(tpm)
	if err == nil {
		return "", errors.New("the owner evicted it")
	}
	return fmt.Sprintf("ak %x", sha256.Sum256(public.OutPublic.Bytes())), nil
}
