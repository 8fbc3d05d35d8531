package daemon

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"time"

	"virt-trust/internal/domain"
	"virt-trust/internal/vtpm/statedir"
)

// watchRemovals sees libvirt remove vTPMs also while nobody is connected to it:
// a VM that is undefined, defined again and started at once is a new one.
// Where a removal is missed, and the VM there again, its start is refused for
// vtpm-missing: an undefined VM and a deleted vTPM look the same then.
func (s *Service) watchRemovals(ctx context.Context) {
	for ctx.Err() == nil {
		err := statedir.Removals(ctx, s.g.cfg.Swtpm.StateRoot, func(name string) {
			if domain.IsUUID(name) {
				go s.removed(ctx, name)
			}
		})
		s.log.WithError(err).Debug("vTPMs' removals are not seen")
		select {
		case <-ctx.Done():
		case <-time.After(2 * time.Second):
		}
	}
}

// removed deletes the record of a VM whose vTPM has just been removed, if
// libvirt has no definition of it: whoever undefines a VM takes the definition
// first. With its definition there, the vTPM is missing.
func (s *Service) removed(ctx context.Context, uuid string) {
	store := s.g.peek()
	if store == nil || store.Get(uuid) == nil {
		return
	}
	others, defined := s.g.definitions(uuid)
	if defined || (others == 0 && len(store.All()) > 1) { // as in reconcile: keys that are erased do not come back
		return
	}
	s.ended(ctx, uuid, "libvirt removed the vTPM, and has no definition of the VM")
}

// definitions reports whether one of libvirt's definitions, under whatever
// name, is a VM's, or cannot be read; and how many others there are, if none is.
func (g *Guard) definitions(uuid string) (others int, defined bool) {
	entries, err := os.ReadDir(g.dirs.Domains)
	if err != nil {
		return 0, true
	}
	for _, e := range entries {
		if e.IsDir() || filepath.Ext(e.Name()) != ".xml" {
			continue
		}
		others++
		b, err := os.ReadFile(filepath.Join(g.dirs.Domains, e.Name()))
		if err != nil || bytes.Contains(bytes.ToLower(b), []byte(uuid)) {
			return 0, true
		}
	}
	return others, false
}
