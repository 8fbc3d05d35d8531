// Package imagefile reads and writes the label of an image on the disk.
package imagefile

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"virt-trust/internal/vtpm/qcow2"
)

// UnsupportedError says why an image cannot carry a label; nothing was written.
type UnsupportedError = qcow2.UnsupportedError

var (
	// ErrNoLabel says that the image has no label.
	ErrNoLabel = qcow2.ErrNoLabel
	// ErrLabelDamaged says that its label was not written like this.
	ErrLabelDamaged = qcow2.ErrLabelDamaged
	// ErrInUse says that a QEMU, qemu-img, qemu-nbd or the like has the image
	// open; nothing was written. It can go away by itself.
	ErrInUse = errors.New("the image is in use")
	// ErrKept says that RemoveLabel was told to leave the label.
	ErrKept = errors.New("the label was not removed: it is another one")
)

// ReadLabel gives the payload of an image's label. It takes no lock, so it also
// works while a VM runs; only at the moment in which QEMU rewrites the header
// may it find neither the old nor the new one whole. Errors: ErrNoLabel, ErrLabelDamaged,
// *UnsupportedError, others when the file cannot be read.
func ReadLabel(path string) ([]byte, error) {
	f, err := open(path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	header, err := parse(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	payload, err := header.Label()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return payload, nil
}

// WriteLabel gives an image a label, in place of one that it may have. When it
// returns, the label is on the disk; when power fails meanwhile, the image has
// the old label or the new one. Errors: ErrInUse, *UnsupportedError, others when
// the file cannot be read or written.
func WriteLabel(path string, payload []byte) error {
	return change(path, func(h *qcow2.Header) (qcow2.Plan, error) { return h.SetLabel(payload) })
}

// HasRoom reports whether an image's header has room for a label of n bytes,
// which may replace the one that is there. Errors: *UnsupportedError, others
// when the file cannot be read.
func HasRoom(path string, n int) (bool, error) {
	f, err := open(path, unix.O_RDONLY)
	if err != nil {
		return false, err
	}
	defer f.Close()
	header, err := parse(f)
	if err != nil {
		return false, fmt.Errorf("%s: %w", path, err)
	}
	return header.HasRoom(n), nil
}

// RemoveLabel takes an image's label out if ok says so of its payload, which is
// nil for a damaged label. Errors: ErrNoLabel, ErrKept, and those of WriteLabel.
func RemoveLabel(path string, ok func(payload []byte) bool) error {
	return change(path, func(h *qcow2.Header) (qcow2.Plan, error) {
		payload, err := h.Label()
		switch {
		case errors.Is(err, qcow2.ErrNoLabel):
			return nil, err
		case !ok(payload):
			return nil, ErrKept
		}
		return h.RemoveLabel()
	})
}

// change carries out a plan for an image's header, with the image locked from
// before its header is read until the last write is on the disk.
func change(path string, plan func(*qcow2.Header) (qcow2.Plan, error)) error {
	f, err := open(path, unix.O_RDWR)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := lock(f); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer unlock(f)
	header, err := parse(f)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	groups, err := plan(header)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, group := range groups {
		for _, w := range group {
			if _, err := f.WriteAt(w.Data, int64(w.Offset)); err != nil {
				return fmt.Errorf("writing the label: %w", err)
			}
		}
		if err := f.Sync(); err != nil {
			return fmt.Errorf("writing the label: %w", err)
		}
	}
	return nil
}

// open follows symbolic links, as libvirt does, and opens regular files and
// block devices only.
func open(path string, mode int) (*os.File, error) {
	// O_NONBLOCK: a FIFO must not make us wait.
	fd, err := unix.Open(path, mode|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFREG && kind != unix.S_IFBLK {
		unix.Close(fd)
		return nil, fmt.Errorf("%s: %w", path, &UnsupportedError{Reason: "it is neither a file nor a block device"})
	}
	return os.NewFile(uintptr(fd), path), nil
}

func parse(f *os.File) (*qcow2.Header, error) {
	first := make([]byte, qcow2.Window)
	n, err := f.ReadAt(first, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return qcow2.Parse(first[:n])
}
