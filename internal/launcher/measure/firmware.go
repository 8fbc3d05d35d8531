package measure

import (
	"encoding/json"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"virt-trust/internal/domain"
)

// descriptor is what is read of a firmware descriptor (QEMU's
// docs/interop/firmware.json).
type descriptor struct {
	Interfaces []string `json:"interface-types"` // uefi, bios
	Mapping    struct {
		Device     string `json:"device"` // flash, memory, kernel
		Filename   string `json:"filename"`
		Executable struct {
			Filename string `json:"filename"`
		} `json:"executable"`
		Template struct {
			Filename string `json:"filename"`
		} `json:"nvram-template"`
	} `json:"mapping"`
	Targets []struct {
		Architecture string   `json:"architecture"`
		Machines     []string `json:"machines"` // shell patterns
	} `json:"targets"`
	Features []string `json:"features"`
}

func (d *descriptor) code() string {
	if d.Mapping.Device == "flash" {
		return d.Mapping.Executable.Filename
	}
	return d.Mapping.Filename
}

// maxDescriptor bounds a descriptor, in bytes.
const maxDescriptor = 1 << 20

func parseDescriptor(b []byte) (*descriptor, error) {
	d := &descriptor{}
	return d, json.Unmarshal(b, d)
}

// biosFolders are where QEMU looks for its own firmware, for a VM that names none.
var biosFolders = []string{"/usr/share/qemu", "/usr/share/seabios", "/usr/share/qemu-kvm"}

// firmware gives a VM's code image and NVRAM template. libvirt has filled in
// the loader by the time of its hook. For a definition that leaves the choice to
// libvirt, the first descriptor that fits is taken, as libvirt does; also where
// the XML names a loader without its template.
func (m *Measurer) firmware(w domain.Firmware) (code, template string, err error) {
	code, template = w.Loader, w.Template
	if code == "" && w.Auto == "" {
		if !strings.HasPrefix(w.Arch, "x86_64") && w.Arch != "i686" {
			return "", "", nil // the machine's own, if it has any
		}
		for _, dir := range biosFolders {
			p := filepath.Join(dir, "bios-256k.bin")
			if _, err := os.Stat(p); err == nil {
				return p, "", nil
			}
		}
		return "", "", nil
	}
	if code != "" && template != "" {
		return code, template, nil
	}
	all, err := m.descriptors()
	if err != nil {
		return "", "", err
	}
	for _, d := range all {
		if code == "" && d.fits(w) {
			code = d.code()
		}
		if code != "" && d.code() == code {
			if template == "" {
				template = d.Mapping.Template.Filename
			}
			break
		}
	}
	return code, template, nil
}

// fits is libvirt's choice (qemuFirmwareMatchDomain), as far as it rests on what
// a definition says of its firmware.
func (d *descriptor) fits(w domain.Firmware) bool {
	kind := map[string]string{"efi": "uefi", "bios": "bios"}[w.Auto]
	if !slices.Contains(d.Interfaces, kind) {
		return false
	}
	machine := false
	for _, t := range d.Targets {
		for _, pattern := range t.Machines {
			ok, err := path.Match(pattern, w.Machine)
			machine = machine || t.Architecture == w.Arch && err == nil && ok
		}
	}
	for _, name := range []string{"secure-boot", "enrolled-keys"} {
		if wanted, said := w.Features[name]; said && wanted != slices.Contains(d.Features, name) {
			return false
		}
	}
	if w.Secure && !slices.Contains(d.Features, "requires-smm") {
		return false
	}
	return machine
}

// descriptors gives the host's firmware descriptors in the order of their names.
func (m *Measurer) descriptors() ([]*descriptor, error) {
	dirs := m.Descriptors
	if dirs == nil {
		dirs = []string{"/usr/share/qemu/firmware", "/etc/qemu/firmware"}
	}
	files := map[string]string{}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil && !os.IsNotExist(err) {
			return nil, err
		}
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".json") {
				files[e.Name()] = filepath.Join(dir, e.Name())
			}
		}
	}
	var all []*descriptor
	for _, name := range slices.Sorted(maps.Keys(files)) {
		f, err := os.Open(files[name]) // may be a link; an empty file hides one
		if err != nil {
			if os.IsNotExist(err) {
				continue
			}
			return nil, err
		}
		b, err := readRegular(f)
		if err != nil {
			return nil, err
		}
		if d, err := parseDescriptor(b); err == nil { // libvirt passes over what it cannot read
			all = append(all, d)
		}
	}
	return all, nil
}

func readRegular(f *os.File) ([]byte, error) {
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fs.ErrInvalid
	}
	return io.ReadAll(io.LimitReader(f, maxDescriptor))
}
