// Package signer is virt-trust-signer: the holder of a CA key that lies in the
// Verifier machine's TPM. The Verifier, which speaks to the whole network, never
// reaches the TPM; it asks here, over a unix socket, for signatures over whole
// certificates and revocation lists, and gets them within the CA's limits alone.
package signer

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"virt-trust/internal/verifier/ca"
	"virt-trust/internal/verifier/cakey"
)

// Options are what main knows.
type Options struct {
	Certificate string // file of the CA's certificate, PEM
	Key         string // TSS2 key file
	Device      string // the TPM
	UID         uint32 // who may ask, beside root
	Log         *logrus.Entry
}

// Init makes a CA whose key is in the TPM. Neither file may be there; but of a CA from
// before there were revocation lists, the certificate is made anew.
func Init(o Options, name string, now time.Time) error {
	if a, err := authority(o); err == nil && !a.Lists() {
		return cakey.Renew(o.Certificate, a, now)
	}
	file, err := Make(o.Device)
	if err != nil {
		return err
	}
	key, err := Load(o.Device, file)
	if err != nil {
		return err
	}
	der, err := ca.Root(key, rand.Reader, name, now)
	if err != nil {
		return fmt.Errorf("making the CA's certificate: %w", err)
	}
	if err := cakey.WriteNew(o.Key, file, 0o600); err != nil {
		return err
	}
	return cakey.WriteNew(o.Certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
}

// Limits of a Verifier: signatures a second in the long run and at once,
// connections, and how long one of them may say nothing.
const (
	perSecond      = 20
	burst          = 1000 // a fleet that comes back after a day
	maxConnections = 16
	silence        = time.Minute
)

// Server signs.
type Server struct {
	cert  *x509.Certificate
	key   crypto.Signer
	uid   uint32
	log   *logrus.Entry
	limit *rate.Limiter
	now   func() time.Time
}

// Open reads certificate and key.
func Open(o Options) (*Server, error) {
	a, err := authority(o)
	if err != nil {
		return nil, err
	}
	return newServer(a.Certificate(), a.Key(), o), nil
}

func authority(o Options) (*ca.Authority, error) {
	cert, err := cakey.ReadCertificate(o.Certificate)
	if err != nil {
		return nil, fmt.Errorf("the CA's certificate: %w; 'virt-trust-signer init' makes a CA", err)
	}
	b, err := os.ReadFile(o.Key)
	if err != nil {
		return nil, fmt.Errorf("the CA's key: %w", err)
	}
	key, err := Load(o.Device, b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.Key, err)
	}
	return ca.New(cert, key, rand.Reader) // they belong together
}

func newServer(cert *x509.Certificate, key crypto.Signer, o Options) *Server {
	return &Server{cert, key, o.UID, o.Log, rate.NewLimiter(perSecond, burst), time.Now}
}

// Serve answers until ctx ends.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	slots := make(chan struct{}, maxConnections)
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("waiting for the Verifier: %w", err)
		}
		slots <- struct{}{}
		go func() {
			defer func() { <-slots }()
			defer conn.Close()
			s.talk(conn)
		}()
	}
}

func (s *Server) talk(conn net.Conn) {
	uid, err := peer(conn)
	if err != nil || uid != 0 && uid != s.uid {
		s.log.WithError(err).WithField("uid", uid).Warn("someone else than the Verifier asked for signatures")
		return
	}
	for {
		_ = conn.SetDeadline(s.now().Add(silence))
		tbs, err := cakey.ReadMessage(conn, ca.MaxCRL)
		if err != nil {
			if !errors.Is(err, io.EOF) {
				s.log.WithError(err).Info("a request that is none")
			}
			return
		}
		status, answer := s.sign(tbs)
		if _, err := conn.Write([]byte{status}); err != nil {
			return
		}
		if err := cakey.WriteMessage(conn, answer); err != nil {
			return
		}
	}
}

// sign answers one request: a refusal is about what was asked for, a failure is
// not.
func (s *Server) sign(tbs []byte) (status byte, answer []byte) {
	digest := sha256.Sum256(tbs)
	log := s.log.WithField("sha256", fmt.Sprintf("%x", digest))
	if err := ca.CheckTBS(s.cert, tbs, s.now()); err != nil {
		log.WithError(err).Warn("refused to sign")
		return cakey.Refused, []byte(err.Error())
	}
	if !s.limit.Allow() {
		log.Warn("refused to sign: too many signatures")
		return cakey.Failed, []byte("too many signatures: try again")
	}
	sig, err := s.key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		log.WithError(err).Error("could not sign")
		return cakey.Failed, []byte("the TPM does not sign: see virt-trust-signer's journal")
	}
	log.WithField("what", ca.Describe(tbs)).Info("signed")
	return cakey.Signed, sig
}

// peer gives the user at the other end (unix(7), SO_PEERCRED).
func peer(conn net.Conn) (uint32, error) {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, errors.New("not a unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if cerr != nil {
		return 0, cerr
	}
	return cred.Uid, nil
}
