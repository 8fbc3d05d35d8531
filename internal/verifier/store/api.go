package store

import (
	"context"
	"errors"
	"io"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
)

// What callers branch on.
var (
	ErrUnavailable = errors.New("the database is not reachable or busy; try again")
	ErrNotFound    = errors.New("not found")
	ErrConflict    = errors.New("taken by another") // see ConflictError
	ErrVersion     = errors.New("changed by another meanwhile; read it again")
	ErrNonce       = errors.New("not the node's outstanding nonce")
	ErrInactive    = errors.New("the node is not active")
	ErrToken       = errors.New("the join token is not good") // see TokenError
	ErrLimit       = errors.New("too many; try again later")
	ErrSamePerson  = errors.New("a second, different person has to approve")
	ErrInvalid     = errors.New("out of bounds")
	ErrNewer       = errors.New("the database was written by a newer version of the Verifier")
)

// ConflictError says what of a node is another's already. It is ErrConflict.
type ConflictError struct {
	Field string // "name", "ek", "ak"; of others what they are
	Node  string // ID of the node that has it
}

func (e *ConflictError) Error() string        { return e.Field + " belongs to another node, " + e.Node }
func (e *ConflictError) Is(target error) bool { return target == ErrConflict }

// TokenError says why a join token is refused. It is ErrToken.
type TokenError struct {
	Reason string // "unknown", "used", "expired", "other-name"
}

func (e *TokenError) Error() string        { return "join token: " + e.Reason }
func (e *TokenError) Is(target error) bool { return target == ErrToken }

// Page asks for at most Limit (100 where 0, at most 1000) from where the page
// before ended: After is what that gave as next, "" for the first page.
type Page struct {
	Limit int
	After string
}

// Nodes

// NodeFilter chooses nodes; zero fields choose all.
type NodeFilter struct {
	State   fleet.NodeState
	Tier    *appraise.Tier // what the newest result says now
	Search  string         // part of the name, or the whole ID
	Problem bool           // only those with a problem
}

// Node gives the node with this ID; ErrNotFound.
func (r reads) Node(ctx context.Context, id string) (fleet.Node, error) { panic("not yet") }

// NodeByName gives the node that is not revoked with this name; ErrNotFound.
func (r reads) NodeByName(ctx context.Context, name string) (fleet.Node, error) { panic("not yet") }

// NodeByEK gives the node that is not revoked with this EK digest; ErrNotFound.
func (r reads) NodeByEK(ctx context.Context, digest string) (fleet.Node, error) { panic("not yet") }

// NodeByAK gives the node that is not revoked with this AK; ErrNotFound.
func (r reads) NodeByAK(ctx context.Context, name []byte) (fleet.Node, error) { panic("not yet") }

// Nodes gives nodes by name, with what their newest results say now, and where
// the next page begins ("" at the end).
func (r reads) Nodes(ctx context.Context, f NodeFilter, p Page) ([]fleet.Status, string, error) {
	panic("not yet")
}

// Status gives one node as Nodes does; ErrNotFound.
func (r reads) Status(ctx context.Context, id string) (fleet.Status, error) { panic("not yet") }

// Summary counts the fleet.
func (r reads) Summary(ctx context.Context) (fleet.Summary, error) { panic("not yet") }

// PutNode adds a node. *ConflictError where its name, EK or AK is that of another
// that is not revoked, or its ID is taken ("id").
func (tx *Tx) PutNode(ctx context.Context, n fleet.Node) error { panic("not yet") }

// UpdateNode writes all of the node but its EK, AK, bind key, certifier and Seen,
// which never change this way. n.Version is that of the node as it was read:
// ErrVersion where it changed meanwhile, ErrNotFound, *ConflictError. A node that
// was revoked stays so: ErrInactive. It gives the new version.
func (tx *Tx) UpdateNode(ctx context.Context, n fleet.Node) (int64, error) { panic("not yet") }

// SetProblem notes what an operator should look at, whatever the node's version;
// "" for nothing any more.
func (tx *Tx) SetProblem(ctx context.Context, node, problem string) error { panic("not yet") }

// Join tokens

// AddToken adds a join token; ErrConflict where there is one with that digest.
func (tx *Tx) AddToken(ctx context.Context, t fleet.JoinToken) error { panic("not yet") }

// UseToken uses up the token for a node of this name and ID: exactly once,
// whoever else tries. *TokenError says why not.
func (tx *Tx) UseToken(ctx context.Context, digest, name, node string) error { panic("not yet") }

// DropToken removes a token that was not used; ErrNotFound.
func (tx *Tx) DropToken(ctx context.Context, digest string) error { panic("not yet") }

// Tokens gives join tokens, newest first.
func (r reads) Tokens(ctx context.Context, p Page) ([]fleet.JoinToken, string, error) {
	panic("not yet")
}

// Challenges

// PutChallenge keeps a challenge until it is taken or expires. ErrLimit where
// its source, or its purpose altogether, has too many (Options.Challenge).
func (s *Store) PutChallenge(ctx context.Context, c fleet.Challenge) error { panic("not yet") }

// TakeChallenge gives the challenge and forgets it: once, among all replicas.
// ErrNotFound also where it has expired.
func (s *Store) TakeChallenge(ctx context.Context, purpose, id string) (fleet.Challenge, error) {
	panic("not yet")
}

// Rounds

// MaxCheckpoint bounds a checkpoint, in bytes.
const MaxCheckpoint = 1 << 20

// RoundState is where a node stands between two rounds.
type RoundState struct {
	Node       string
	Nonce      []byte    // outstanding; nil for none
	Expires    time.Time // of the nonce
	Checkpoint []byte    // the caller's, of the last round; nil before the first
	Round      int64     // ID of the newest round; 0 before the first
	Received   time.Time // of the newest round
	Version    int64     // rises with each round
}

// RoundState gives where the node stands; ErrNotFound.
func (r reads) RoundState(ctx context.Context, node string) (RoundState, error) { panic("not yet") }

// IssueNonce makes nonce the one that is outstanding, in place of any before it.
// ErrInactive where the node is not active, ErrNotFound.
func (s *Store) IssueNonce(ctx context.Context, node string, nonce []byte, expires time.Time) (RoundState, error) {
	panic("not yet")
}

// Completion is what came of a round.
type Completion struct {
	Node  string
	Nonce []byte // the outstanding one; used up by this
	// Checkpoint is what the caller wants to have back in the next RoundState, at
	// most MaxCheckpoint. One that is equal to the last one costs nothing.
	Checkpoint []byte
	Result     *appraise.Result // Received and Expires are taken from it
	// Evidence is kept where the result is not affirming, of host and all VMs.
	Evidence []byte
	// Next becomes the outstanding nonce, until NextExpires; nil for none.
	Next        []byte
	NextExpires time.Time
}

// CompleteRound takes in what came of a round, in whole or not at all: ErrNonce
// where the nonce is not outstanding any more (used, replaced, expired),
// ErrInactive, ErrNotFound. It gives the round's ID. A round without evidence to
// keep, whose result is that of the round before but for its times, prolongs that
// one (Round.Count); all it costs is one small row.
func (tx *Tx) CompleteRound(ctx context.Context, c Completion) (int64, error) { panic("not yet") }

// CompleteRound is Tx.CompleteRound alone.
func (s *Store) CompleteRound(ctx context.Context, c Completion) (int64, error) { panic("not yet") }

// CodeExpired is the reason in a result that has expired, CodeInactive in that of
// a node that is not active.
const (
	CodeExpired  = "result-expired"
	CodeInactive = "node-not-active"
)

// Result gives the node's newest result as it counts now: once it has expired, or
// the node is not active, every tier in it is None, every vector empty, and the
// first reason says so. ErrNotFound before the first round.
func (r reads) Result(ctx context.Context, node string) (*appraise.Result, error) { panic("not yet") }

// PreviousResult gives the node's newest result as it was received, to compare
// the next one with: it says nothing about now. ErrNotFound before the first
// round.
func (r reads) PreviousResult(ctx context.Context, node string) (*appraise.Result, error) {
	panic("not yet")
}

// VMFilter chooses VMs; zero fields choose all.
type VMFilter struct {
	UUID   string
	Node   string
	Tier   *appraise.Tier // what the newest result says now
	EK     string         // digest
	Search string         // part of the name, or the whole UUID
}

// VMs gives VMs by UUID and node.
func (r reads) VMs(ctx context.Context, f VMFilter, p Page) ([]fleet.VM, string, error) {
	panic("not yet")
}

// VMsByEK gives the VMs, of any node that is not revoked, whose EK digest is one
// of these: two UUIDs with one EK share a vTPM. By EK, UUID, node; at most 1000.
func (r reads) VMsByEK(ctx context.Context, digests ...string) ([]fleet.VM, error) {
	panic("not yet")
}

// RoundFilter chooses rounds; zero fields choose all.
type RoundFilter struct {
	Node        string
	VM          string // rounds that name this VM
	NotAffirmed bool
	Since       time.Time
}

// Rounds gives rounds, newest first, without Evidence and Result.
func (r reads) Rounds(ctx context.Context, f RoundFilter, p Page) ([]fleet.Round, string, error) {
	panic("not yet")
}

// Round gives one round with all that was kept of it; ErrNotFound.
func (r reads) Round(ctx context.Context, id int64) (fleet.Round, error) { panic("not yet") }

// Expired is a node whose result expired before another came.
type Expired struct {
	Node, Name string
	Tier       appraise.Tier // what it was
	Expires    time.Time
}

// TakeExpired gives active nodes whose results have expired and of which that was
// not given before: each expiry exactly once among all replicas, if the
// transaction commits.
func (tx *Tx) TakeExpired(ctx context.Context, limit int) ([]Expired, error) { panic("not yet") }

// TakeTurn says whether the caller is the one who does the work of this name now:
// true for one replica only, and not again before every has passed.
func (s *Store) TakeTurn(ctx context.Context, work string, every time.Duration) (bool, error) {
	panic("not yet")
}

// Reference Values

// ValueFilter chooses Reference Values; zero fields choose all.
type ValueFilter struct {
	Subject *string
	Kind    fleet.Kind
	State   fleet.ValueState
	Source  string
	Search  string // part of the path, or the whole digest
}

// AddValues adds Reference Values in the state that each has, Proposed or
// Approved; one that is there already (subject, kind, path, digest) and not
// rejected is left as it is. One with FourEyes has to be Proposed. It gives how
// many were new.
func (tx *Tx) AddValues(ctx context.Context, vs []fleet.Value) (int, error) { panic("not yet") }

// SetValueState moves a value from one state to another: ErrVersion where it is
// not in the state from any more, ErrNotFound, ErrSamePerson where FourEyes wants
// another person than who proposed it to approve it. who is that person.
func (tx *Tx) SetValueState(ctx context.Context, id int64, from, to fleet.ValueState, who string) error {
	panic("not yet")
}

// Value gives one Reference Value; ErrNotFound.
func (r reads) Value(ctx context.Context, id int64) (fleet.Value, error) { panic("not yet") }

// Values gives Reference Values, newest first.
func (r reads) Values(ctx context.Context, f ValueFilter, p Page) ([]fleet.Value, string, error) {
	panic("not yet")
}

// ValuesFor gives all approved values of these subjects: "" for all, a node's ID
// and its VMs' UUIDs, for one appraisal.
func (r reads) ValuesFor(ctx context.Context, subjects ...string) ([]fleet.Value, error) {
	panic("not yet")
}

// ValuesVersion gives a number that rises when the values of any of these
// subjects change: while it is the same, what ValuesFor gave is too. 0 where
// there never were any. Read it before ValuesFor.
func (r reads) ValuesVersion(ctx context.Context, subjects ...string) (int64, error) {
	panic("not yet")
}

// Settings

// Setting gives the newest version; ErrNotFound.
func (r reads) Setting(ctx context.Context, name string) (fleet.Setting, error) { panic("not yet") }

// SettingVersions gives all versions, newest first.
func (r reads) SettingVersions(ctx context.Context, name string, p Page) ([]fleet.Setting, string, error) {
	panic("not yet")
}

// PutSetting adds version c.Version of a document, which has to be one more than
// the newest, 1 for the first: ErrVersion.
func (tx *Tx) PutSetting(ctx context.Context, c fleet.Setting) error { panic("not yet") }

// Webhooks

// AddHook adds a webhook and gives its ID.
func (tx *Tx) AddHook(ctx context.Context, h fleet.Hook) (int64, error) { panic("not yet") }

// DropHook removes a webhook and what waits for it; ErrNotFound.
func (tx *Tx) DropHook(ctx context.Context, id int64) error { panic("not yet") }

// Hooks gives all webhooks by ID, secrets included.
func (r reads) Hooks(ctx context.Context) ([]fleet.Hook, error) { panic("not yet") }

// Enqueue puts an event into the queue of each webhook that wants it (whose
// Events name it, or are empty) and gives how many do.
func (tx *Tx) Enqueue(ctx context.Context, event string, body []byte) (int, error) {
	panic("not yet")
}

// Claim gives at most n deliveries that are due, for the caller alone until lease
// has passed; Attempts counts this one. No order is kept.
func (s *Store) Claim(ctx context.Context, n int, lease time.Duration) ([]fleet.Delivery, error) {
	panic("not yet")
}

// Done removes a delivery that arrived.
func (s *Store) Done(ctx context.Context, d fleet.Delivery) error { panic("not yet") }

// MaxAttempts is how often a delivery is tried: over about three days.
const MaxAttempts = 20

// Retry puts a delivery that did not arrive back, to be tried after Backoff of
// its attempts, or gives it up after MaxAttempts. ErrVersion where the lease
// passed and another has it.
func (s *Store) Retry(ctx context.Context, d fleet.Delivery, why string) error { panic("not yet") }

// DeadLetters gives deliveries that were given up, newest first.
func (r reads) DeadLetters(ctx context.Context, p Page) ([]fleet.Delivery, string, error) {
	panic("not yet")
}

// Revive queues a dead letter anew; ErrNotFound.
func (tx *Tx) Revive(ctx context.Context, id int64) error { panic("not yet") }

// Queued counts the deliveries that wait and those that were given up.
func (r reads) Queued(ctx context.Context) (waiting, dead int, err error) { panic("not yet") }

// Sessions

// PutSession keeps a session; ErrConflict where there is one with that digest.
func (s *Store) PutSession(ctx context.Context, v fleet.Session) error { panic("not yet") }

// Session gives a session; ErrNotFound also where it has expired.
func (r reads) Session(ctx context.Context, digest string) (fleet.Session, error) {
	panic("not yet")
}

// DropSession ends a session; no error where there is none.
func (s *Store) DropSession(ctx context.Context, digest string) error { panic("not yet") }

// DropSessionsOf ends all of a person's and gives how many they were.
func (tx *Tx) DropSessionsOf(ctx context.Context, person string) (int, error) { panic("not yet") }

// Audit

// Audit appends an entry when the transaction commits: Time, Actor, Action,
// Subject and Detail are the caller's; a zero Time is now.
func (tx *Tx) Audit(e fleet.AuditEntry) { panic("not yet") }

// AuditLog gives audit entries, newest first.
func (r reads) AuditLog(ctx context.Context, p Page) ([]fleet.AuditEntry, string, error) {
	panic("not yet")
}

// AuditHead gives where the audit log ends: to be noted elsewhere, so that a log
// that was cut or written anew is found out. The zero head for an empty log.
func (r reads) AuditHead(ctx context.Context) (fleet.AuditHead, error) { panic("not yet") }

// VerifyAudit goes over the whole audit log: each hash, each link, and that every
// head in noted is in it. It gives the head; *fleet.AuditError says where the log
// is broken. progress, where it is not nil, is told how many entries are done.
func (r reads) VerifyAudit(ctx context.Context, noted []fleet.AuditHead, progress func(done int64)) (fleet.AuditHead, error) {
	panic("not yet")
}

// ExportAudit writes the audit log as JSON lines, which fleet.VerifyExport checks
// without a database, and gives its head.
func (r reads) ExportAudit(ctx context.Context, w io.Writer) (fleet.AuditHead, error) {
	panic("not yet")
}

// Retention

// Retention says what Expire removes; zero fields remove nothing. The newest
// round of a node stays always, and the audit log is never shortened.
type Retention struct {
	RoundAge      time.Duration
	EvidenceAge   time.Duration
	EvidenceBytes int64 // of all evidence; the oldest of who has most goes first
	DeadLetterAge time.Duration
}

// Removed counts what Expire removed.
type Removed struct {
	Rounds, Evidence, DeadLetters, Sessions, Challenges, Tokens int64
	EvidenceBytes                                               int64
}

// Expire removes what is over age at now, in small transactions; and sessions,
// challenges and unused join tokens that have expired.
func (s *Store) Expire(ctx context.Context, now time.Time, p Retention) (Removed, error) {
	panic("not yet")
}

// Stats are the database's own figures.
type Stats struct {
	Backend       string // sqlite, postgres
	SchemaVersion int64
	Bytes         int64 // on disk
	EvidenceBytes int64
	Rounds        int64
}

// Stats gives them.
func (r reads) Stats(ctx context.Context) (Stats, error) { panic("not yet") }

// Backup writes a copy of a SQLite database, as of one moment, to a new file; for
// PostgreSQL there is pg_dump.
func (s *Store) Backup(ctx context.Context, path string) error { panic("not yet") }
