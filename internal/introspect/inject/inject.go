// Package inject asks a running VM's vTPM something between two commands of the
// guest.
package inject

import (
	"context"
	"errors"

	"virt-trust/internal/evidence/report"
	"virt-trust/internal/introspect"
)

// Quoter has vTPMs quote.
type Quoter struct{}

// Quote has the vTPM quote all PCRs of its first active bank, SHA-256 before
// others, by the key at the persistent handle ak, and reads all active banks
// in the same pause.
func (q *Quoter) Quote(ctx context.Context, t introspect.Target, qualifying [32]byte, ak uint32) (*report.Quote, *report.Reading, error) {
	return nil, nil, errors.ErrUnsupported
}

// Read implements introspect.Reader, by TPM2_PCR_Read.
func (q *Quoter) Read(ctx context.Context, t introspect.Target) (*report.Reading, error) {
	return nil, errors.ErrUnsupported
}
