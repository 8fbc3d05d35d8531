package daemon

import (
	"reflect"
	"time"

	"virt-trust/internal/bus"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/vtpm/reason"
)

const propertiesChanged = "org.freedesktop.DBus.Properties.PropertiesChanged"

// announceHost tells what of the host's state differs from what was told last.
// Called with statusMu held.
func (s *Service) announceHost(now dict) {
	changed := dict{}
	for _, name := range []string{"State", "Problem", "DifferingPCRs"} {
		if !reflect.DeepEqual(s.status.state[name], now[name]) {
			changed[name] = now[name]
		}
	}
	s.wasReady.Store(now["State"].Value() == hosttpm.Ready)
	if len(changed) > 0 {
		s.emit(bus.HostPath, propertiesChanged, bus.HostInterface, changed, []string{})
	}
}

// noticeHost has the TPM asked how it is, for those who listen. Its caller does
// not wait.
func (s *Service) noticeHost() {
	if !s.asking.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer s.asking.Store(false)
		s.statusMu.Lock()
		s.status.at = time.Time{}
		s.statusMu.Unlock()
		s.hostProperties()
	}()
}

// notice follows up what a decision says of the host. It costs a start nothing
// on a host that is as it was.
func (s *Service) notice(err error) {
	r := reason.As(err)
	switch {
	case err == nil && !s.wasReady.Load():
		s.noticeHost()
	case r == nil:
	case r.Code == reason.HostNotApproved, r.Code == reason.KeyNotReleased, r.Code == reason.TPMBusy, r.Code == reason.TPMLockedOut, r.Code == reason.TPMFailed:
		s.noticeHost()
	case r.Code == reason.ListDamaged, r.Code == reason.ListRolledBack:
		s.emit(bus.Path, propertiesChanged, bus.ManagerInterface, s.managerProperties(), []string{})
	}
}
