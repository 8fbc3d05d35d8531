package cakey

import (
	"crypto"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// The talk with virt-trust-signer, over a unix socket: a request is what is to be
// signed, a TBSCertificate or TBSCertList, after its length in four bytes, big endian;
// the answer is one byte, Signed, Refused or Failed, and a signature or a text, after
// its length in four bytes. A connection may have several.
const (
	Signed  = 0
	Refused = 1
	Failed  = 2

	maxAnswer  = 4 << 10
	signerTime = 30 * time.Second // a TPM's slow signature, and its queue
)

// Signer is virt-trust-signer: a crypto.MessageSigner. It signs certificates and
// revocation lists within the CA's limits and nothing else.
type Signer struct {
	Socket string
	public crypto.PublicKey
}

// Public is the CA's public key.
func (s *Signer) Public() crypto.PublicKey { return s.public }

// Sign is there because a crypto.MessageSigner has it.
func (s *Signer) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("virt-trust-signer signs whole certificates and lists, no digests")
}

// SignMessage has a TBSCertificate or TBSCertList signed.
func (s *Signer) SignMessage(_ io.Reader, tbs []byte, _ crypto.SignerOpts) ([]byte, error) {
	conn, err := net.DialTimeout("unix", s.Socket, signerTime)
	if err != nil {
		return nil, fmt.Errorf("virt-trust-signer cannot be reached, see 'systemctl status virt-trust-signer.socket': %w", err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(signerTime))
	if err := WriteMessage(conn, tbs); err != nil {
		return nil, fmt.Errorf("asking virt-trust-signer: %w", err)
	}
	var status [1]byte
	if _, err := io.ReadFull(conn, status[:]); err != nil {
		return nil, fmt.Errorf("virt-trust-signer does not answer: %w", err)
	}
	answer, err := ReadMessage(conn, maxAnswer)
	switch {
	case err != nil:
		return nil, fmt.Errorf("virt-trust-signer does not answer: %w", err)
	case status[0] == Signed:
		return answer, nil
	case status[0] == Refused:
		return nil, fmt.Errorf("virt-trust-signer refuses: %q", answer)
	}
	return nil, fmt.Errorf("virt-trust-signer: %q", answer)
}

// WriteMessage sends one message.
func WriteMessage(w io.Writer, b []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(b)), uint32(len(b))), b...))
	return err
}

// ReadMessage reads one of at most limit bytes. io.EOF where there is none.
func ReadMessage(r io.Reader, limit int) ([]byte, error) {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n == 0 || int64(n) > int64(limit) {
		return nil, fmt.Errorf("message of %d bytes, at most %d", n, limit)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return b, nil
}
