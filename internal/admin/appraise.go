package admin

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"virt-trust/internal/appraise"
	"virt-trust/internal/appraise/ear"
	"virt-trust/internal/evidence/quote"
	"virt-trust/internal/evidence/report"
	"virt-trust/internal/launcher/refvalues"
	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/vtpm/reason"
)

// appraisal is the flags of virt-trust appraise.
type appraisal struct {
	ak, ca, nonce, node, policy, keys string
	certificate                       *x509.Certificate // that --ak names, to be held against --ca
	references                        []string
	learn                             string
	result, jwks                      string
}

func (c *Command) appraiseCommand() *cobra.Command {
	a := &appraisal{}
	cmd := &cobra.Command{
		Use:   "appraise FILE... | --result FILE --jwks FILE",
		Short: "Appraise Evidence of a host, or check an Attestation Result, off line",
		Long: "Appraises Evidence that was kept in a file against the AK of its host, Reference Values and a policy. More files of one host, oldest first, are rounds that follow each other: the last one is told. " +
			"With --result it checks an Attestation Result (EAR) that a Verifier signed.",
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case a.result != "" && len(args) == 0 && a.jwks != "":
				return c.checkResult(a)
			case a.result != "" || a.jwks != "":
				return &exit{ExitUsage, errors.New("--result and --jwks go together, and without Evidence")}
			case len(args) == 0 || a.ak == "":
				return &exit{ExitUsage, errors.New("a file with Evidence and --ak are needed, or --result and --jwks")}
			}
			return c.appraiseFiles(a, args)
		},
	}
	f := cmd.Flags()
	f.StringVar(&a.ak, "ak", "", "the host's AK: TPMT_PUBLIC, TPM2B_PUBLIC, a public key in PEM, or the node's certificate")
	f.StringVar(&a.ca, "ca", "", "the certificate of the CA that the node's certificate has to be by")
	f.StringVar(&a.nonce, "nonce", "", "the nonce of the newest Evidence, in hexadecimal")
	f.StringVar(&a.node, "node", "", "the node's id, for Reference Values that are its own")
	f.StringArrayVar(&a.references, "reference", nil, "a file of Reference Values")
	f.StringVar(&a.policy, "policy", "", "a policy file")
	f.StringVar(&a.keys, "keys", "", "public keys in PEM: policy and Reference Values must be signed, each FILE in FILE.sig")
	f.StringVar(&a.learn, "learn", "", "take the first Evidence for right, and write what it has as Reference Values to this file")
	f.StringVar(&a.result, "result", "", "an Attestation Result (EAR) to check")
	f.StringVar(&a.jwks, "jwks", "", "the Verifier's key set")
	return cmd
}

// Bounds of files that are read.
const maxSmallFile = 1 << 20

// readFile reads a file of at most max bytes.
func readFile(name string, max int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, max+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > max {
		return nil, fmt.Errorf("%s has more than %d bytes", name, max)
	}
	return b, nil
}

func (c *Command) appraiseFiles(a *appraisal, files []string) error {
	in, err := a.input()
	if err != nil {
		return notAppraised(err)
	}
	var result appraise.Result
	learned := appraise.ValuesFile{Format: appraise.ValuesFormat, Name: "learned", Serial: 1, Values: []appraise.ValueEntry{}}
	for i, name := range files {
		if in.Evidence, err = readFile(name, report.MaxEvidence); err != nil {
			return notAppraised(err)
		}
		if in.Nonce, in.Now, err = stated(in.Evidence); err != nil {
			return notAppraised(fmt.Errorf("%s: %w", name, err))
		}
		if i == len(files)-1 && a.nonce != "" {
			if in.Nonce, err = hex.DecodeString(a.nonce); err != nil {
				return &exit{ExitUsage, fmt.Errorf("--nonce: %w", err)}
			}
		}
		var values []appraise.ValueEntry
		result, in.Previous, values = round(in)
		learned.Values = append(learned.Values, values...)
		if len(values) > 0 {
			in.Values = append(in.Values, appraise.NewValues((&appraise.ValuesFile{Values: values}).Approved("learned")))
		}
	}
	if err := a.checkCertificate(in.Now); err != nil {
		return notAppraised(err)
	}
	if a.certificate != nil && a.ca == "" {
		fmt.Fprintln(c.Stderr, "virt-trust: without --ca nothing shows that the certificate is the node's")
	}
	if a.nonce == "" {
		fmt.Fprintln(c.Stderr, "virt-trust: without --nonce nothing shows that the Evidence is not an old one")
	}
	if a.learn != "" {
		b, err := json.MarshalIndent(learned, "", "  ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(a.learn, append(b, '\n'), 0o644); err != nil {
			return err
		}
	}
	if err := c.print(result, func(w io.Writer) { writeResult(w, &result) }); err != nil {
		return err
	}
	return verdict(result.Host.Tier, result.VMs)
}

func round(in appraise.Input) (appraise.Result, *appraise.Checkpoint, []appraise.ValueEntry) {
	result, next, learned := appraise.Round(in)
	var values []appraise.ValueEntry
	for _, v := range learned {
		values = append(values, appraise.ValueEntry{Subject: v.Subject, Kind: v.Kind, Path: v.Path, Digest: v.Digest})
	}
	return result, next, values
}

// stated is what Evidence says of its nonce and its time, for an appraisal of a
// moment that is past. Evidence that cannot be read is the appraisal's to judge.
func stated(evidence []byte) (nonce []byte, at time.Time, err error) {
	e, err := report.UntrustedParse(evidence)
	if err != nil {
		return nil, at, err
	}
	r, err := report.UntrustedParseReport(e.Report)
	if err != nil {
		return nil, at, err
	}
	return e.Nonce, time.UnixMicro(r.Time), nil
}

func (a *appraisal) input() (in appraise.Input, err error) {
	in.Node.ID = a.node
	in.Learn = a.learn != ""
	if err := a.readAK(&in.Node); err != nil {
		return in, fmt.Errorf("--ak %s: %w", a.ak, err)
	}
	if a.ca != "" && a.certificate == nil {
		return in, &exit{ExitUsage, errors.New("--ca goes with a certificate as --ak")}
	}
	var keys []any
	if a.keys != "" {
		b, err := readFile(a.keys, maxSmallFile)
		if err != nil {
			return in, err
		}
		if keys, err = refvalues.ParseKeys(b); err != nil {
			return in, fmt.Errorf("--keys %s: %w", a.keys, err)
		}
	}
	in.Policy = appraise.DefaultPolicy()
	if a.policy != "" {
		b, sig, err := a.signed(a.policy, appraise.MaxPolicy)
		if err != nil {
			return in, err
		}
		if in.Policy, err = appraise.ParsePolicy(b); err == nil && a.keys != "" {
			in.Policy, err = appraise.VerifyPolicy(b, sig, keys)
		}
		if err != nil {
			return in, fmt.Errorf("%s: %w", a.policy, err)
		}
	}
	for _, name := range a.references {
		b, sig, err := a.signed(name, appraise.MaxValuesFile)
		if err != nil {
			return in, err
		}
		f, err := appraise.ParseValues(b)
		if err == nil && a.keys != "" {
			f, err = appraise.VerifyValues(b, sig, keys)
		}
		if err != nil {
			return in, fmt.Errorf("%s: %w", name, err)
		}
		in.Values = append(in.Values, appraise.NewValues(f.Approved("file")))
	}
	return in, nil
}

// signed reads a file, and its signature where there have to be some.
func (a *appraisal) signed(name string, max int64) (b, sig []byte, err error) {
	if b, err = readFile(name, max); err != nil || a.keys == "" {
		return b, nil, err
	}
	sig, err = readFile(name+".sig", refvalues.MaxSignature)
	return b, sig, err
}

// readAK reads an AK. Of a key in PEM the Name is not known: that of the report is
// as good, since the key itself signed it. A certificate names the node too.
func (a *appraisal) readAK(n *appraise.Node) error {
	b, err := readFile(a.ak, maxSmallFile)
	if err != nil {
		return err
	}
	block, _ := pem.Decode(b)
	cert, err := x509.ParseCertificate(b)
	switch {
	case err == nil:
		return a.certified(n, cert)
	case block == nil:
		n.AK, n.AKName, err = parseAK(b)
		return err
	case block.Type == "CERTIFICATE":
		if cert, err = x509.ParseCertificate(block.Bytes); err != nil {
			return err
		}
		return a.certified(n, cert)
	case block.Type != "PUBLIC KEY":
		return fmt.Errorf("a PEM file with a %.40q, not a PUBLIC KEY or CERTIFICATE", block.Type)
	}
	k, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return err
	}
	var ok bool
	if n.AK, ok = k.(*ecdsa.PublicKey); !ok {
		return fmt.Errorf("a %T: an AK is ECDSA over NIST P-256", k)
	}
	return nil
}

// certified takes the AK out of the certificate of a node, or of its certifier.
func (a *appraisal) certified(n *appraise.Node, cert *x509.Certificate) error {
	id, err := ca.UntrustedIdentity(cert)
	switch {
	case err != nil:
		return fmt.Errorf("the certificate of no node: %w", err)
	case id.AKPublic == nil:
		return errors.New("the certificate names its AK and does not hold it, as those of an older Verifier: give the AK itself")
	case n.ID != "" && n.ID != id.Node:
		return fmt.Errorf("the certificate of node %s, and --node is %.40q", id.Node, n.ID)
	}
	n.ID, n.AKName, a.certificate = id.Node, id.AK, cert
	n.AK, err = ca.AKOf(id.AKPublic)
	return err
}

// checkCertificate says whether the CA gave the node its certificate, and whether
// it was good when the Evidence was made. Off line nobody tells of a node that was
// revoked.
func (a *appraisal) checkCertificate(at time.Time) error {
	if a.ca == "" {
		return nil
	}
	b, err := readFile(a.ca, maxSmallFile)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(b) {
		return fmt.Errorf("--ca %s: no certificate in PEM", a.ca)
	}
	// No others: what a node's certifier signed is no node's certificate.
	_, err = a.certificate.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return fmt.Errorf("--ak %s: %w", a.ak, err)
	}
	return nil
}

// parseAK reads a TPMT_PUBLIC, or a TPM2B_PUBLIC, as tpm2_readpublic writes it.
func parseAK(b []byte) (*ecdsa.PublicKey, []byte, error) {
	o, err := quote.ParsePublic(b)
	if err != nil && len(b) > 2 && int(b[0])<<8|int(b[1]) == len(b)-2 {
		o, err = quote.ParsePublic(b[2:])
	}
	if err != nil {
		return nil, nil, err
	}
	key, err := o.AK()
	return key, o.Name, err
}

// verdict is the exit code: of the host and the VMs that run, the worst.
func verdict(host appraise.Tier, vms []appraise.VM) error {
	tiers := []appraise.Tier{host}
	for _, v := range vms {
		if v.Running || v.Tier == appraise.Contraindicated {
			tiers = append(tiers, v.Tier)
		}
	}
	switch {
	case slices.Contains(tiers, appraise.Contraindicated):
		return &exit{code: ExitRefused}
	case slices.Contains(tiers, appraise.None):
		return &exit{code: ExitNotAppraised}
	}
	return nil
}

func writeResult(w io.Writer, r *appraise.Result) {
	fields(w, "Node", reason.OneLine(r.Node), "Host name", reason.OneLine(r.HostName), "Kernel", reason.OneLine(r.Kernel), "virt-trust", reason.OneLine(r.Software),
		"Boot", reason.OneLine(r.BootID), "Time", local(&r.Received))
	fmt.Fprintf(w, "Host: %s\n", r.Host.Tier)
	writeReasons(w, r.Host.Reasons)
	for _, v := range r.VMs {
		at := "at rest"
		if v.Running {
			at = "running"
		}
		fmt.Fprintf(w, "VM %s (%s, %s): %s\n", reason.OneLine(v.Name), reason.OneLine(v.UUID), at, v.Tier)
		writeReasons(w, v.Reasons)
	}
	for _, ch := range r.Changes {
		fmt.Fprintf(w, "Changed: %s: %s\n", reason.OneLine(ch.Subject), reason.OneLine(ch.What))
	}
}

func writeReasons(w io.Writer, reasons []appraise.Reason) {
	for _, r := range reasons {
		fmt.Fprintf(w, "  %s: %s: %s\n", r.Tier, reason.OneLine(r.Code), reason.OneLine(r.What))
		where := ""
		if r.Entry != nil {
			where = fmt.Sprintf("entry %d of %s", *r.Entry, r.Log)
		}
		for _, p := range [][2]string{{"", where}, {"path", r.Path}, {"is", r.Digest}, {"expected", r.Expected}} {
			if p[1] != "" {
				fmt.Fprintf(w, "    %s\n", strings.TrimSpace(p[0]+" "+reason.OneLine(p[1])))
			}
		}
	}
}

// checkResult checks an EAR as a relying party has to.
func (c *Command) checkResult(a *appraisal) error {
	token, err := readFile(a.result, ear.MaxToken)
	if err != nil {
		return notAppraised(err)
	}
	set, err := readFile(a.jwks, maxSmallFile)
	if err != nil {
		return notAppraised(err)
	}
	claims, err := ear.Verify(string(bytes.TrimSpace(token)), set, time.Now())
	if err != nil {
		return notAppraised(fmt.Errorf("%s: %w", a.result, err))
	}
	if err := c.print(claims, func(w io.Writer) { writeClaims(w, claims) }); err != nil {
		return err
	}
	var vms []appraise.VM
	for name, s := range claims.Submods {
		if name != ear.Host {
			vms = append(vms, appraise.VM{Running: s.Running == nil || *s.Running, Appraisal: appraise.Appraisal{Tier: s.Status}})
		}
	}
	return verdict(claims.Submods[ear.Host].Status, vms)
}

func writeClaims(w io.Writer, c *ear.Claims) {
	issued, expires := time.Unix(c.Issued, 0), time.Unix(c.Expires, 0)
	fields(w, "Node", reason.OneLine(c.Subject), "Host name", reason.OneLine(c.HostName), "Verifier", reason.OneLine(c.VerifierID.Developer+" "+c.VerifierID.Build),
		"Issued", local(&issued), "Expires", local(&expires))
	names := make([]string, 0, len(c.Submods))
	for name := range c.Submods {
		names = append(names, name)
	}
	slices.Sort(names) // "host" before "vm/"
	for _, name := range names {
		s := c.Submods[name]
		label := reason.OneLine(name)
		if s.Name != "" {
			label += " " + reason.OneLine(s.Name)
		}
		fmt.Fprintf(w, "%s: %s\n", label, s.Status)
		writeReasons(w, s.Reasons)
	}
}
