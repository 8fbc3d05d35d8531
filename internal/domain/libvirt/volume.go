package libvirt

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// poolFolders hold the pools' XML: of the active ones, then of all that are defined.
var poolFolders = []string{"/run/libvirt/storage", "/etc/libvirt/storage"}

const maxPoolXML = 1 << 20

// ErrNotAFile says that a pool's volumes are not files in a folder.
var ErrNotAFile = errors.New("the pool's volumes are no files in a folder")

// ResolveVolume finds the path of a volume in a pool of type dir, fs or netfs,
// whose volumes are the files in one folder. It reads libvirt's files and
// never asks libvirt, which may be waiting for a hook.
func ResolveVolume(pool, volume string) (string, error) {
	return resolveVolume(poolFolders, pool, volume)
}

func resolveVolume(folders []string, pool, volume string) (string, error) {
	// libvirt allows neither a slash in a pool's name nor one in such a volume's.
	for _, n := range []string{pool, volume} {
		if n == "" || n == "." || n == ".." || len(n) > 255 || strings.ContainsAny(n, "/\x00") {
			return "", fmt.Errorf("%.100q is not the name of a pool or volume", n)
		}
	}
	for _, folder := range folders {
		f, err := os.Open(filepath.Join(folder, pool+".xml"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("pool %q: %w", pool, err)
		}
		target, err := poolTarget(io.LimitReader(f, maxPoolXML))
		f.Close()
		if err != nil {
			return "", fmt.Errorf("pool %q: %w", pool, err)
		}
		return filepath.Join(target, volume), nil
	}
	return "", fmt.Errorf("pool %q: %w", pool, fs.ErrNotExist)
}

// poolTarget reads the folder from a pool's XML: <pool> in its configuration,
// <poolstate><pool> in its state.
func poolTarget(r io.Reader) (string, error) {
	dec := xml.NewDecoder(r)
	for {
		t, err := dec.Token()
		if err != nil {
			return "", fmt.Errorf("reading its XML: %w", err)
		}
		e, ok := t.(xml.StartElement)
		if !ok || e.Name.Local != "pool" {
			continue
		}
		var p struct {
			Type string `xml:"type,attr"`
			Path string `xml:"target>path"`
		}
		if err := dec.DecodeElement(&p, &e); err != nil {
			return "", fmt.Errorf("reading its XML: %w", err)
		}
		switch p.Type {
		case "dir", "fs", "netfs":
		default:
			return "", fmt.Errorf("type %.32q: %w", p.Type, ErrNotAFile)
		}
		if !filepath.IsAbs(p.Path) {
			return "", fmt.Errorf("its target %.100q is not an absolute path", p.Path)
		}
		return p.Path, nil
	}
}
