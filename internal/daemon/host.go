package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/sirupsen/logrus"

	"virt-trust/internal/bus/components"
	"virt-trust/internal/evidence/eventlog"
	"virt-trust/internal/hosttpm"
	"virt-trust/internal/hosttpm/policy"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/vtpm/reason"
)

type approvedState = policy.Approved

// maxNote is how long an admin's note may be.
const maxNote = 500

// hostMethods is org.virttrust1.Host.
func (s *Service) hostMethods() map[string]any {
	plain := func(method string, who access, body func(context.Context, *caller, dict) (dict, error)) func(dict, dbus.Sender) (dict, *dbus.Error) {
		return func(options dict, sender dbus.Sender) (dict, *dbus.Error) {
			result := dict{}
			return result, s.serve(sender, method, who, adminDeadline, func(ctx context.Context, c *caller) error {
				d, err := body(ctx, c, options)
				maps.Copy(result, d)
				return s.hostRefusal(err)
			})
		}
	}
	approve := func(method string, who access, really bool) func(string, []dict, dict, dbus.Sender) (dict, *dbus.Error) {
		return func(how string, parts []dict, options dict, sender dbus.Sender) (dict, *dbus.Error) {
			return plain(method, who, func(ctx context.Context, c *caller, options dict) (dict, error) {
				return s.approve(ctx, c, how, parts, options, really)
			})(options, sender)
		}
	}
	many := func(method string, body func(context.Context) ([]dict, error)) func(dict, dbus.Sender) ([]dict, *dbus.Error) {
		return func(_ dict, sender dbus.Sender) ([]dict, *dbus.Error) {
			all := []dict{}
			return all, s.serve(sender, method, reader, adminDeadline, func(ctx context.Context, _ *caller) (err error) {
				all, err = body(ctx)
				return s.hostRefusal(err)
			})
		}
	}
	return map[string]any{
		"States":   many("States", s.hostStates),
		"History":  many("History", s.hostHistory),
		"Approve":  approve("Approve", polkitAction, true),
		"Predict":  approve("Predict", reader, false),
		"NextBoot": plain("NextBoot", polkitAction, s.nextBoot),
		"DryRun":   plain("DryRun", reader, s.dryRun),
		"Revoke": func(ids []string, options dict, sender dbus.Sender) (dict, *dbus.Error) {
			return plain("Revoke", polkitAction, func(ctx context.Context, c *caller, options dict) (dict, error) {
				return s.revoke(ctx, c, ids, options)
			})(options, sender)
		},
	}
}

// hostRefusal is tpmRefusal for what the host's methods add.
func (s *Service) hostRefusal(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, hosttpm.ErrPolicy):
		return reason.Refuse(reason.HostNotApproved,
			"boot a state that is approved and do it there, or use the recovery key; 'virt-trust host dry-run' says what changed",
			"only an approved state can do this, and the host is in none")
	case errors.Is(err, hosttpm.ErrCurrentState):
		return reason.Refuse(reason.PolicyForbids, "boot another approved state first; --force does it all the same, and then only such a boot or the recovery key leads back",
			"the host is in this state now: without it no VM with a vTPM would start")
	case errors.Is(err, hosttpm.ErrTooMany):
		return reason.Refuse(reason.PolicyForbids, "'virt-trust host revoke' what is not needed any more", "%s", err)
	}
	return s.g.tpmRefusal(err)
}

func (s *Service) hostStates(ctx context.Context) ([]dict, error) {
	states, err := s.host.States(ctx)
	if err != nil {
		return nil, err
	}
	all := []dict{}
	for _, a := range states.Approved {
		d := strs("id", a.ID(), "note", a.Note)
		d["time"] = dbus.MakeVariant(uint64(a.Time.UnixMicro()))
		d["pcrs"] = dbus.MakeVariant(u32s(a.Indexes()))
		d["current"] = dbus.MakeVariant(states.Match != nil && states.Match.ID() == a.ID())
		all = append(all, d)
	}
	return all, nil
}

func (s *Service) hostHistory(context.Context) ([]dict, error) {
	events, err := s.history.all()
	if err != nil {
		return nil, err
	}
	all := []dict{}
	for _, e := range events {
		d := strs("event", e.Event, "what", e.What, "note", e.Note)
		d["time"], d["uid"] = dbus.MakeVariant(uint64(e.Time)), dbus.MakeVariant(e.UID)
		d["states"] = dbus.MakeVariant(append([]string{}, e.States...))
		all = append(all, d)
	}
	return all, nil
}

func u32s(p []uint) []uint32 {
	out := []uint32{}
	for _, i := range p {
		out = append(out, uint32(i))
	}
	return out
}

// change is eventlog.Change as (us).
type change struct {
	PCR  uint32
	What string
}

func changesOf(all []eventlog.Change) []change {
	out := []change{}
	for _, c := range all {
		out = append(out, change{uint32(c.PCR), c.What})
	}
	return out
}

// readEventLog reads the log of this boot.
func (s *Service) readEventLog() (*eventlog.Log, error) {
	path := s.g.cfg.TPM.EventLog
	raw, err := readUpTo(path, eventlog.MaxSize)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no event log at %s: the kernel got none from firmware and boot loader", path)
	}
	if err != nil {
		return nil, err
	}
	l, err := eventlog.UntrustedParse(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return l, nil
}

// explained gives this boot's log, of the configured bank, if it leads to the
// PCRs of now.
func (s *Service) explained(now policy.State) (*eventlog.Log, error) {
	l, err := s.readEventLog()
	if err != nil {
		return nil, err
	}
	return l.Explain(now.Bank, now.PCRs)
}

// selected is the part of now that the configuration names.
func (s *Service) selected(now policy.State) policy.State {
	out := policy.State{Bank: now.Bank, PCRs: map[uint][]byte{}}
	for _, p := range s.g.cfg.TPM.PCRs {
		out.PCRs[p] = now.PCRs[p]
	}
	return out
}

// proposal is what would be approved.
type proposal struct {
	states  []policy.State
	log     *eventlog.Log // of the boot into the first of them; may be nil
	changes []eventlog.Change
	what    string
}

func (s *Service) approve(ctx context.Context, c *caller, how string, parts []dict, options dict, really bool) (dict, error) {
	note := option[string](options, "note")
	if len(note) > maxNote {
		return nil, fmt.Errorf("a note of %d bytes, at most %d", len(note), maxNote)
	}
	states, err := s.host.States(ctx)
	if err != nil {
		return nil, err
	}
	var p *proposal
	switch how {
	case "current":
		p, err = s.proposeCurrent(states)
	case "predict":
		p, err = s.proposePredicted(states, parts)
	case "pcrlock":
		p, err = s.proposePCRLock(states, option[string](options, "prediction"))
	default:
		err = fmt.Errorf("there is no approval of %q, but current, predict and pcrlock", how)
	}
	if err != nil {
		return nil, err
	}
	ids := []string{}
	var fresh []policy.State
	for _, st := range p.states {
		ids = append(ids, st.ID())
		if !slices.ContainsFunc(states.Approved, func(a *approvedState) bool { return a.ID() == st.ID() }) {
			fresh = append(fresh, st)
		}
	}
	result := strs("what", p.what)
	result["states"], result["changes"] = dbus.MakeVariant(ids), dbus.MakeVariant(changesOf(p.changes))
	if !really {
		return result, nil
	}
	if p.log != nil && len(p.states) > 0 {
		if err := s.logs.save(p.states[0].ID(), p.log); err != nil {
			return nil, fmt.Errorf("keeping the event log: %w", err)
		}
	}
	if len(fresh) == 0 {
		if len(p.states) > 0 {
			result["what"] = dbus.MakeVariant("approved already; nothing was changed")
		}
		return result, nil
	}
	if err := s.host.Approve(ctx, note, fresh...); err != nil {
		return nil, err
	}
	ids = nil
	for _, st := range fresh {
		ids = append(ids, st.ID())
	}
	s.note(HostEvent{Event: eventApproved, States: ids, What: p.what, Note: note, UID: int64(c.uid)}, journal.HostApproved, logrus.WarnLevel)
	return result, nil
}

// proposeCurrent: a state that is approved needs it only where other PCRs were
// configured since.
func (s *Service) proposeCurrent(states *hosttpm.States) (*proposal, error) {
	if states.Match == nil {
		return nil, hosttpm.ErrPolicy
	}
	now := s.selected(states.Now)
	p := &proposal{}
	p.log, _ = s.explained(now) // without one there is only less to say later
	if states.Match.Bank == now.Bank && slices.Equal(states.Match.Indexes(), now.Indexes()) {
		p.what, p.states = "nothing to do: the state that the host is in is approved", []policy.State{states.Match.State}
		return p, nil
	}
	p.states = []policy.State{now}
	p.what = fmt.Sprintf("the state that the host is in, by PCR %s in place of %s", pcrs(now.Indexes()), pcrs(states.Match.Indexes()))
	return p, nil
}

func (s *Service) proposePredicted(states *hosttpm.States, parts []dict) (*proposal, error) {
	if len(parts) > maxComponents {
		return nil, fmt.Errorf("%d components, at most %d", len(parts), maxComponents)
	}
	now := s.selected(states.Now)
	const mend = "'virt-trust host approve --next-boot' lets one boot go unchecked"
	l, err := s.explained(now)
	if err != nil {
		return nil, reason.Refuse(reason.PolicyForbids, mend, "the next boot cannot be told: %s", err)
	}
	all := components.UntrustedDecode(parts)
	next, err := l.Predict(now.Bank, now.Indexes(), all...)
	if err != nil {
		return nil, reason.Refuse(reason.PolicyForbids, mend, "the next boot cannot be told: %s", err)
	}
	values, err := next.Replay(now.Bank)
	if err != nil {
		return nil, err
	}
	p := &proposal{states: []policy.State{{Bank: now.Bank, PCRs: map[uint][]byte{}}}, log: next}
	for _, i := range now.Indexes() {
		p.states[0].PCRs[i] = values[i]
	}
	if p.changes, err = eventlog.Diff(l, next, now.Bank, now.Indexes()); err != nil {
		return nil, err
	}
	var names []string
	for _, c := range all {
		name := c.New.Name
		if c.Kind == eventlog.Cmdline {
			name = fmt.Sprintf("%q", c.Text)
		}
		names = append(names, c.Kind+" "+name)
	}
	p.what = reason.OneLine("a boot with " + strings.Join(names, ", "))
	return p, nil
}

// maxComponents of a boot are replaced at once.
const maxComponents = 64

func (s *Service) proposePCRLock(states *hosttpm.States, prediction string) (*proposal, error) {
	all, predicted, err := policy.ParsePCRLock([]byte(prediction), s.selected(states.Now))
	if err != nil {
		return nil, reason.Refuse(reason.PolicyForbids, "see 'systemd-pcrlock make-policy'", "%s", err)
	}
	return &proposal{states: all, what: fmt.Sprintf("what systemd-pcrlock predicts for PCR %s", pcrs(predicted))}, nil
}

func (s *Service) nextBoot(ctx context.Context, c *caller, options dict) (dict, error) {
	note := option[string](options, "note")
	if len(note) > maxNote {
		return nil, fmt.Errorf("a note of %d bytes, at most %d", len(note), maxNote)
	}
	e := HostEvent{Event: eventNextBoot, What: "the next boot, and no other, gets the keys of vTPMs whatever it brings up", Note: note, UID: int64(c.uid)}
	if option[bool](options, "cancel") {
		e.Event, e.What = eventCancelled, "the next boot is checked as every other"
		err := s.host.Unwaive(ctx)
		if errors.Is(err, hosttpm.ErrNoWaiver) {
			return strs("what", "nothing to do: the next boot is checked as every other"), nil
		}
		if err != nil {
			return nil, err
		}
	} else if err := s.host.Waive(ctx, note); err != nil {
		return nil, err
	}
	s.note(e, journal.NextBootGiven, logrus.WarnLevel)
	return strs("what", e.What), nil
}

func (s *Service) revoke(ctx context.Context, c *caller, ids []string, options dict) (dict, error) {
	if len(ids) == 0 {
		return nil, errors.New("no state was named")
	}
	pending, _ := s.host.Waiver()
	gone, err := s.host.Revoke(ctx, option[bool](options, "force"), ids...)
	if errors.Is(err, hosttpm.ErrUnknownState) {
		return nil, reason.Refuse(reason.PolicyForbids, "'virt-trust host states' lists them", "%s", err)
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, a := range gone {
		names = append(names, a.ID())
	}
	if states, err := s.host.States(ctx); err == nil {
		s.logs.prune(states)
	}
	e := HostEvent{Event: eventRevoked, States: names, What: "revoked, with every copy of its approval", Note: option[string](options, "note"), UID: int64(c.uid)}
	if pending != nil {
		e.What += "; the boot without PCR check that was asked for is taken back with it"
	}
	s.note(e, journal.HostRevoked, logrus.WarnLevel)
	result := strs("what", e.What)
	result["states"] = dbus.MakeVariant(names)
	return result, nil
}

// dryRun says how the host differs from an approved state, event by event.
func (s *Service) dryRun(ctx context.Context, _ *caller, options dict) (dict, error) {
	states, err := s.host.States(ctx)
	if err != nil {
		return nil, err
	}
	against := states.Match
	if against == nil {
		against = states.Nearest
	}
	if id := option[string](options, "state"); id != "" {
		n := slices.IndexFunc(states.Approved, func(a *approvedState) bool { return strings.HasPrefix(a.ID(), id) })
		if n < 0 {
			return nil, reason.Refuse(reason.PolicyForbids, "'virt-trust host states' lists them", "no approved state has the ID %q", id)
		}
		against = states.Approved[n]
	}
	d := strs("state", "", "log", "")
	d["approved"] = dbus.MakeVariant(states.Match != nil)
	d["pcrs"], d["changes"] = dbus.MakeVariant([]uint32{}), dbus.MakeVariant([]change{})
	if against == nil {
		d["log"] = dbus.MakeVariant("no state is approved")
		return d, nil
	}
	d["state"] = dbus.MakeVariant(against.ID())
	differing := against.Differing(states.Now)
	d["pcrs"] = dbus.MakeVariant(u32s(differing))
	if len(differing) == 0 {
		return d, nil
	}
	changes, why := s.compare(against, states.Now, differing)
	d["changes"], d["log"] = dbus.MakeVariant(changesOf(changes)), dbus.MakeVariant(why)
	return d, nil
}

// compare holds this boot's log against the one that was kept of a state. why
// says what of the difference it does not explain.
func (s *Service) compare(against *approvedState, now policy.State, differing []uint) (changes []eventlog.Change, why string) {
	was, err := s.logs.load(against.ID())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "no event log was kept of the approved state"
	}
	if err != nil {
		return nil, reason.OneLine("the event log of the approved state: " + err.Error())
	}
	l, err := s.explained(now)
	var partly *eventlog.NotReplayed
	if errors.As(err, &partly) { // what it says of the other PCRs is right
		l, err = s.readEventLog()
		why = partly.Error()
	}
	if err != nil {
		return nil, reason.OneLine(err.Error())
	}
	told := slices.DeleteFunc(slices.Clone(differing), func(p uint) bool { return partly != nil && slices.Contains(partly.PCRs, p) })
	if changes, err = eventlog.Diff(was, l, now.Bank, told); err != nil {
		return nil, reason.OneLine(err.Error())
	}
	return changes, why
}

// settleHost does what waited for the TPM: a revocation that was cut short, the
// boot without PCR check.
func (s *Service) settleHost(ctx context.Context) {
	done, err := s.host.Settle(ctx)
	if done.Revocation && err == nil {
		s.log.WithField(journal.ID, journal.HostRevoked).Warn("a revocation that was cut short has been carried out or undone: see 'virt-trust host states'")
	}
	if u := done.Used; u != nil && err == nil {
		given := fmt.Sprintf(", as asked for at %s", u.Waiver.Time.Format(time.RFC3339))
		e := HostEvent{Event: eventUnused, What: "that boot was in an approved state" + given, Note: u.Waiver.Note, UID: byItself}
		level := logrus.WarnLevel
		switch {
		case u.Approved != nil:
			e.Event, e.States, level = eventUsed, []string{u.Approved.ID()}, logrus.ErrorLevel
			e.What = "this boot was not checked" + given + "; its state is approved from now on"
		case u.Void:
			e.Event, e.What = eventVoid, "the boot without PCR check"+given+", was not used in time, or twice, or was revoked"
		}
		s.note(e, journal.NextBootUsed, level)
	}
	if err != nil && !errors.Is(err, hosttpm.ErrAbsent) {
		s.log.WithError(err).Error("settling what is approved")
	}
}

// note makes known what was done to approvals. That it could not be written
// down does not undo it.
func (s *Service) note(e HostEvent, id journal.Event, level logrus.Level) {
	e.What, e.Note = reason.OneLine(e.What), reason.OneLine(e.Note)
	l := s.log.WithFields(logrus.Fields{journal.ID: id, "event": e.Event, "states": strings.Join(e.States, " "), "uid": e.UID})
	text := "host: " + e.Event + ": " + e.What
	if e.Note != "" {
		text += " (" + e.Note + ")"
	}
	l.Log(level, text)
	if err := s.history.add(e); err != nil {
		l.WithError(err).Error("writing the host's history")
	}
	s.statusMu.Lock()
	s.status.at = time.Time{} // what was told of the host may be right no longer
	s.statusMu.Unlock()
	s.noticeHost()
}

// keepEventLog keeps the log of this boot, if its state is approved and none
// was kept, for later boots to be held against. What is approved and not in the
// history, by the first provisioning or with the recovery key, is noted there.
func (s *Service) keepEventLog(ctx context.Context) error {
	states, err := s.host.States(ctx)
	if err != nil {
		return err
	}
	events, err := s.history.all()
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for _, e := range events {
		for _, id := range e.States {
			known[id] = e.Event != eventRevoked
		}
	}
	for _, a := range slices.Backward(states.Approved) {
		if known[a.ID()] {
			continue
		}
		e := HostEvent{Time: a.Time.UnixMicro(), Event: eventApproved, States: []string{a.ID()}, Note: a.Note, UID: byItself}
		if err := s.history.add(e); err != nil {
			return err
		}
	}
	if states.Match == nil {
		return nil
	}
	if _, err := s.logs.load(states.Match.ID()); err == nil {
		return nil
	}
	l, err := s.explained(states.Now)
	if err != nil {
		return err
	}
	return s.logs.save(states.Match.ID(), l)
}
