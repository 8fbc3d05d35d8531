package page

import (
	"cmp"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
)

// The chain of a VM: each link is vouched for by those before it, so none is
// shown better than what it rests on.
const (
	linkTPM = iota
	linkFirmware
	linkLoader
	linkKernel
	linkDaemon
	linkSwtpm
	linkImage
	linkQEMU
	linkVTPM
	linkGuestFirmware
	linkGuestLoader
	linkGuestKernel
	numLinks
)

// link is one part of the chain.
type link struct {
	ID, Title, Where string
	Detail           string // of one line, from the host or the guest
	Tier             appraise.Tier
	Word             string // the tier, or why there is none
	Rests            bool   // what it rests on is broken
	Findings         []finding
	PCRs             []pcrValue
	Facts            []fact
}

type fact struct{ Name, Value string }

// Hex says whether it is a digest, a key's name or the like.
func (f fact) Hex() bool {
	return len(f.Value) >= 32 && strings.Trim(f.Value, "0123456789abcdef") == ""
}

type pcrValue struct {
	Bank, Value string
	Index       uint
	Tier        appraise.Tier
	Bad         bool
}

// chain is the whole of it.
type chain struct {
	Host, VM string
	Links    []link
	Tier     appraise.Tier
}

// parts are the links as they are before anything is known.
var parts = [numLinks]struct{ id, title, where string }{
	linkTPM:           {"host-tpm", "Host TPM", "hardware: its EK and AK sign the quote"},
	linkFirmware:      {"host-firmware", "Host firmware", "host PCRs 0–3, 6, 7"},
	linkLoader:        {"host-loader", "Boot loader", "host PCRs 4, 5"},
	linkKernel:        {"host-kernel", "Host kernel", "host PCRs 8, 9, 11–14"},
	linkDaemon:        {"host-daemon", "virt-trustd", "host PCRs 10, 15: files that ran, launch log"},
	linkSwtpm:         {"swtpm", "swtpm", "launch log: what plays the vTPM"},
	linkImage:         {"firmware-image", "Firmware image", "launch log: what the guest boots from"},
	linkQEMU:          {"qemu", "QEMU", "launch log: what runs the guest"},
	linkVTPM:          {"vtpm", "vTPM", "its EK and certificate"},
	linkGuestFirmware: {"guest-firmware", "Guest firmware", "vTPM PCRs 0–3, 6, 7"},
	linkGuestLoader:   {"guest-loader", "Guest boot loader", "vTPM PCRs 4, 5"},
	linkGuestKernel:   {"guest-kernel", "Guest kernel", "vTPM PCRs 8–15"},
}

// roles maps launchers to links; roles of package launcher/measure.
func roleLink(role string) int {
	switch role {
	case "swtpm", "swtpm_setup", "swtpm-library", "virt-trust":
		return linkSwtpm
	case "firmware", "nvram-template":
		return linkImage
	}
	return linkQEMU
}

// pcrLink says which link a PCR measures: TCG PC Client PFP, 3.3.4, and for 8 to
// 14 GRUB, systemd-stub and shim.
func pcrLink(i uint, guest bool) int {
	host := linkKernel
	switch {
	case i <= 3 || i == 6 || i == 7:
		host = linkFirmware
	case i == 4 || i == 5:
		host = linkLoader
	case (i == 10 || i == 15) && !guest:
		return linkDaemon
	}
	if guest {
		return host - linkFirmware + linkGuestFirmware
	}
	return host
}

// hostLink says which link of the host a reason is about.
func hostLink(r appraise.Reason, launchers map[string]int) int {
	switch {
	case r.Log == "ima" || strings.HasPrefix(r.Code, "ima-"):
		return linkDaemon
	case r.Log == "launch-log" || strings.HasPrefix(r.Code, "launch"):
		if l, ok := launchers[r.Path]; ok && r.Path != "" {
			return l
		}
		return linkDaemon
	case r.Code == "vtpm-list-state" || r.Code == "audit-mode" || r.Code == "vm-hidden":
		return linkDaemon
	case r.PCR != nil:
		return pcrLink(*r.PCR, false)
	case r.Log == "tcg-event-log" || strings.HasPrefix(r.Code, "event-") || r.Code == "firmware-error" || strings.HasPrefix(r.Code, "host-"):
		return linkFirmware
	}
	return linkTPM
}

// vmLink says which link a reason of the VM is about; -1 for the host's.
func vmLink(r appraise.Reason, launchers map[string]int) int {
	switch {
	case inherited(r.Code):
		return -1
	case r.Log == "launch-log" || strings.HasPrefix(r.Code, "launch"):
		if l, ok := launchers[r.Path]; ok && r.Path != "" {
			return l
		}
		return linkQEMU
	case r.Code == "vm-pcr-other" && r.PCR != nil:
		return pcrLink(*r.PCR, true)
	case r.Code == "vm-no-values":
		return linkGuestFirmware
	}
	return linkVTPM
}

// newChain holds a VM's result against the parts.
func newChain(n fleet.Status, res *appraise.Result, vm *appraise.VM) *chain {
	c := &chain{Host: n.Name, VM: vm.Name, Tier: vm.Tier, Links: make([]link, numLinks)}
	launchers := map[string]int{}
	for _, l := range vm.Launchers {
		launchers[l.Path] = roleLink(l.Role)
	}
	own := make([][]appraise.Reason, numLinks)
	for _, r := range res.Host.Reasons {
		l := hostLink(r, launchers)
		own[l] = append(own[l], r)
	}
	for _, r := range vm.Reasons {
		if l := vmLink(r, launchers); l >= 0 {
			own[l] = append(own[l], r)
		}
	}
	broken := false // something before is not to be trusted, so nothing vouches for what follows
	for i := range c.Links {
		l := link{ID: parts[i].id, Title: parts[i].title, Where: parts[i].where, Findings: findings(own[i])}
		l.Tier = appraise.Affirming
		if i < linkSwtpm && res.Host.Tier == appraise.None || i >= linkSwtpm && vm.Tier == appraise.None {
			l.Tier = appraise.None
		}
		for j, r := range own[i] {
			if j == 0 || worse(r.Tier, l.Tier) < 0 {
				l.Tier = r.Tier
			}
		}
		l.Word = tierWord(l.Tier)
		switch {
		case len(own[i]) > 0:
		case i >= linkSwtpm && !vm.Running:
			l.Tier, l.Word = appraise.None, "not running"
		case broken:
			l.Tier, l.Word, l.Rests = appraise.None, "not vouched for", true
		case l.Tier == appraise.None:
			l.Word = "not appraised"
		}
		if l.Tier == appraise.Contraindicated || l.Tier == appraise.None {
			// The three launchers stand side by side: one does not vouch for another.
			if i < linkSwtpm || i > linkQEMU {
				broken = true
			}
		}
		if i == linkQEMU && slices.ContainsFunc(c.Links[linkSwtpm:linkQEMU], func(l link) bool {
			return l.Tier == appraise.Contraindicated || l.Tier == appraise.None
		}) || i == linkQEMU && (l.Tier == appraise.Contraindicated || l.Tier == appraise.None) {
			broken = true
		}
		c.Links[i] = l
	}
	c.facts(n, res, vm)
	return c
}

// facts adds what the links are made of.
func (c *chain) facts(n fleet.Status, res *appraise.Result, vm *appraise.VM) {
	hostPCRs, guestPCRs := pcrs(res.PCRs.Texts(), res.Host.Reasons), pcrs(vm.PCRs.Texts(), vm.Reasons)
	for _, v := range hostPCRs {
		if v.Index < 16 {
			l := &c.Links[pcrLink(v.Index, false)]
			l.PCRs = append(l.PCRs, v)
		}
	}
	for _, v := range guestPCRs {
		if v.Index < 16 {
			l := &c.Links[pcrLink(v.Index, true)]
			l.PCRs = append(l.PCRs, v)
		}
	}
	c.Links[linkTPM].Facts = []fact{{"EK vouched for by", n.EKTrust}, {"AK", fmt.Sprintf("%x", n.AKName)}}
	c.Links[linkKernel].Facts = []fact{{"Release, as the host says", res.Kernel}}
	c.Links[linkDaemon].Facts = []fact{{"Version, as the host says", res.Software}}
	for _, l := range vm.Launchers {
		k := &c.Links[roleLink(l.Role)]
		k.Facts = append(k.Facts, fact{l.Role, l.Path}, fact{"SHA-256", l.SHA256})
		if l.By != "" {
			k.Facts = append(k.Facts, fact{"Approved by", l.By})
		}
	}
	if vm.EK != "" {
		c.Links[linkVTPM].Facts = append(c.Links[linkVTPM].Facts, fact{"EK, SHA-256", vm.EK})
	}
	if cert := certificate(vm.EKCertificate); cert != nil {
		c.Links[linkVTPM].Facts = append(c.Links[linkVTPM].Facts, cert...)
	} else {
		c.Links[linkVTPM].Facts = append(c.Links[linkVTPM].Facts, fact{"EK certificate", "none"})
	}
	for i := range c.Links {
		l := &c.Links[i]
		l.Facts = slices.DeleteFunc(l.Facts, func(f fact) bool { return f.Value == "" })
		switch {
		case len(l.Findings) == 1:
			l.Detail = l.Findings[0].Code
		case len(l.Findings) > 1:
			l.Detail = fmt.Sprintf("%s +%d", l.Findings[0].Code, len(l.Findings)-1)
		case i == linkTPM:
			l.Detail = "AK " + beginning(fmt.Sprintf("%x", n.AKName))
		case i == linkKernel:
			l.Detail = res.Kernel
		case i == linkDaemon:
			l.Detail = res.Software
		case i == linkVTPM && vm.EK != "":
			l.Detail = "EK " + beginning(vm.EK)
		case i >= linkSwtpm && i <= linkQEMU && len(l.Facts) > 0:
			l.Detail = path.Base(l.Facts[0].Value)
		case len(l.PCRs) > 0:
			l.Detail = fmt.Sprintf("PCR %d %s", l.PCRs[0].Index, beginning(l.PCRs[0].Value))
		}
	}
}

// beginning of a digest, for a picture.
func beginning(digest string) string {
	if len(digest) > 10 {
		return digest[:10] + "…"
	}
	return digest
}

// Summary is the chain in one sentence, for those who do not see it.
func (c *chain) Summary() string {
	for _, l := range c.Links {
		if l.Tier == appraise.Contraindicated || l.Tier == appraise.None && l.Word != "not running" {
			return fmt.Sprintf("The chain is broken at %q (%s); nothing after it is vouched for.", l.Title, l.Word)
		}
	}
	for _, l := range c.Links {
		if l.Tier == appraise.Warning {
			return fmt.Sprintf("The chain holds, with a warning at %q.", l.Title)
		}
	}
	if slices.ContainsFunc(c.Links, func(l link) bool { return l.Word == "not running" }) {
		return "The VM does not run; its host's part of the chain holds."
	}
	return fmt.Sprintf("All %d links are affirmed.", len(c.Links))
}

// pcrs lists PCRs by bank and index, and marks those that a reason is about.
func pcrs(m map[string]string, rs []appraise.Reason) []pcrValue {
	bad := map[uint]appraise.Tier{}
	for _, r := range rs {
		if r.PCR != nil {
			if t, ok := bad[*r.PCR]; !ok || worse(r.Tier, t) < 0 {
				bad[*r.PCR] = r.Tier
			}
		}
	}
	out := make([]pcrValue, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		bank, index, _ := strings.Cut(k, ":")
		i, err := strconv.ParseUint(index, 10, 8)
		if err != nil {
			continue
		}
		v := pcrValue{Bank: bank, Index: uint(i), Value: m[k]}
		v.Tier, v.Bad = bad[v.Index]
		out = append(out, v)
	}
	slices.SortStableFunc(out, func(a, b pcrValue) int {
		return cmp.Or(strings.Compare(a.Bank, b.Bank), cmp.Compare(a.Index, b.Index))
	})
	return out
}
