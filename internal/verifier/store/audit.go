package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"

	"virt-trust/internal/verifier/fleet"
)

// Audit appends an entry when the transaction commits: Time, Actor, Action,
// Subject and Detail are the caller's; a zero Time is now. All four texts
// together have at most fleet.MaxAuditText bytes, or the transaction fails.
func (tx *Tx) Audit(e fleet.AuditEntry) { tx.audit = append(tx.audit, e) }

// appendAudit is the last thing that a transaction does: who appends holds the
// head, and everybody else who wants to append waits.
func (tx *Tx) appendAudit(ctx context.Context) error {
	if len(tx.audit) == 0 {
		return nil
	}
	var head fleet.AuditHead
	err := tx.one(ctx, "SELECT id, hash FROM audit_head WHERE one = 1"+tx.d.forUpdate, nil, &head.ID, &head.Hash)
	for _, e := range tx.audit {
		if err != nil {
			break
		}
		if e.Time.IsZero() {
			e.Time = tx.now()
		}
		e.Actor, e.Action, e.Subject, e.Detail = fleet.CleanText(e.Actor), fleet.CleanText(e.Action), fleet.CleanText(e.Subject), fleet.CleanText(e.Detail)
		if n := len(e.Actor) + len(e.Action) + len(e.Subject) + len(e.Detail); n > fleet.MaxAuditText {
			err = fmt.Errorf("%w: audit entry of %d bytes", ErrInvalid, n)
			break
		}
		e = head.Next(e)
		head = fleet.AuditHead{ID: e.ID, Hash: e.Hash}
		_, err = tx.exec(ctx, "INSERT INTO audit (id, time, actor, action, subject, detail, previous, hash) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
			e.ID, e.Time, e.Actor, e.Action, e.Subject, e.Detail, e.Previous, e.Hash)
	}
	if err == nil {
		_, err = tx.exec(ctx, "UPDATE audit_head SET id = ?, hash = ? WHERE one = 1", head.ID, head.Hash)
	}
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	return nil
}

func readAudit(scan func(...any) error, e *fleet.AuditEntry) error {
	return scan(&e.ID, at{&e.Time}, &e.Actor, &e.Action, &e.Subject, &e.Detail, &e.Previous, &e.Hash)
}

// AuditFilter chooses audit entries; zero fields choose all.
type AuditFilter struct {
	Actor, Action, Subject string
}

// AuditLog gives audit entries, newest first.
func (r reads) AuditLog(ctx context.Context, f AuditFilter, p Page) ([]fleet.AuditEntry, string, error) {
	before, err := p.before()
	if err != nil {
		return nil, "", err
	}
	var c conditions
	c.add("id < ?", before)
	for _, by := range [][2]string{{"actor", f.Actor}, {"action", f.Action}, {"subject", f.Subject}} {
		if by[1] != "" {
			c.add(by[0]+" = ?", by[1])
		}
	}
	all, err := list(ctx, r, "SELECT id, time, actor, action, subject, detail, previous, hash FROM audit"+c.String()+" ORDER BY id DESC LIMIT ?", append(c.args, p.limit()+1), readAudit)
	if err != nil {
		return nil, "", fmt.Errorf("audit log: %w", err)
	}
	all, next := paged(all, p, func(e fleet.AuditEntry) string { return cursor(strconv.FormatInt(e.ID, 10)) })
	return all, next, nil
}

// AuditHead gives where the audit log ends: to be noted elsewhere, so that a log
// that was cut or written anew is found out. The zero head for an empty log.
func (r reads) AuditHead(ctx context.Context) (fleet.AuditHead, error) {
	var h fleet.AuditHead
	if err := r.one(ctx, "SELECT id, hash FROM audit_head WHERE one = 1", nil, &h.ID, &h.Hash); err != nil {
		return fleet.AuditHead{}, fmt.Errorf("audit log: %w", err)
	}
	return h, nil
}

// auditPage is how many entries are read at once.
const auditPage = 1000

// eachAudit gives all entries up to the head that it also gives, in order. What
// is appended meanwhile is left for the next time.
func (r reads) eachAudit(ctx context.Context, f func(fleet.AuditEntry) error) (fleet.AuditHead, error) {
	head, err := r.AuditHead(ctx)
	if err != nil {
		return head, err
	}
	for last := int64(-1 << 63); ; {
		// An entry with an ID beyond the head is only left out if the head is right.
		all, err := list(ctx, r, "SELECT id, time, actor, action, subject, detail, previous, hash FROM audit WHERE id > ? AND id <= ? ORDER BY id LIMIT ?",
			[]any{last, head.ID, auditPage}, readAudit)
		if err != nil {
			return head, fmt.Errorf("audit log: %w", err)
		}
		for _, e := range all {
			if err := f(e); err != nil {
				return head, err
			}
			last = e.ID
		}
		if len(all) < auditPage {
			return head, nil
		}
	}
}

// VerifyAudit goes over the whole audit log: each hash, each link, that it ends
// where the database says, and that every head in noted is in it. It gives the
// head; *fleet.AuditError says where the log is broken. progress, where it is not
// nil, is told now and then how many entries are done.
func (r reads) VerifyAudit(ctx context.Context, noted []fleet.AuditHead, progress func(done int64)) (fleet.AuditHead, error) {
	c := fleet.NewChain(noted...)
	head, err := r.eachAudit(ctx, func(e fleet.AuditEntry) error {
		if err := c.Add(e); err != nil {
			return err
		}
		if progress != nil && e.ID%auditPage == 0 {
			progress(e.ID)
		}
		return nil
	})
	if err != nil {
		return c.Head(), err
	}
	if c.Head() != head {
		return c.Head(), &fleet.AuditError{ID: head.ID, Why: "missing, and it should be the last, or is another"}
	}
	if progress != nil {
		progress(head.ID)
	}
	return c.End()
}

// ExportAudit writes the audit log as JSON lines, which fleet.VerifyExport checks
// without a database, and gives its head. It checks nothing itself.
func (r reads) ExportAudit(ctx context.Context, w io.Writer) (fleet.AuditHead, error) {
	b := bufio.NewWriter(w)
	head, err := r.eachAudit(ctx, func(e fleet.AuditEntry) error {
		_, err := b.Write(append(e.Line(), '\n'))
		return err
	})
	if err := errors.Join(err, b.Flush()); err != nil {
		return head, fmt.Errorf("writing the audit log out: %w", err)
	}
	return head, nil
}
