package store

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
)

// Bounds of a round, in bytes.
const (
	MaxCheckpoint = 1 << 20
	MaxEvidence   = 64 << 20
	maxResult     = 64 << 20
	maxNonce      = 64
)

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
func (r reads) RoundState(ctx context.Context, node string) (RoundState, error) {
	v := RoundState{Node: node}
	err := r.one(ctx, `SELECT s.nonce, s.nonce_expires, s.round, s.received, s.version, c.data FROM node_state s LEFT JOIN checkpoints c ON c.node = s.node
 WHERE s.node = ?`, []any{node}, &v.Nonce, at{&v.Expires}, &v.Round, at{&v.Received}, &v.Version, &v.Checkpoint)
	if err != nil {
		return RoundState{}, fmt.Errorf("round of node %s: %w", node, err)
	}
	return v, nil
}

// IssueNonce makes nonce the one that is outstanding, in place of any before it.
// ErrInactive where the node is not active, ErrNotFound.
func (s *Store) IssueNonce(ctx context.Context, node string, nonce []byte, expires time.Time) (RoundState, error) {
	if len(nonce) == 0 || len(nonce) > maxNonce {
		return RoundState{}, fmt.Errorf("%w: nonce of %d bytes", ErrInvalid, len(nonce))
	}
	var v RoundState
	err := s.Do(ctx, func(tx *Tx) error {
		n, err := tx.exec(ctx, "UPDATE node_state SET nonce = ?, nonce_expires = ? WHERE node = ? AND EXISTS (SELECT 1 FROM nodes WHERE id = ? AND state = 'active')",
			nonce, expires, node, node)
		if err != nil {
			return err
		}
		if v, err = tx.RoundState(ctx, node); err == nil && n == 0 {
			err = ErrInactive
		}
		return err
	})
	if err != nil {
		return RoundState{}, fmt.Errorf("nonce for node %s: %w", node, err)
	}
	return v, nil
}

// Completion is what came of a round.
type Completion struct {
	Node  string
	Nonce []byte // the outstanding one; used up by this
	// Checkpoint is what the caller wants to have back in the next RoundState, at
	// most MaxCheckpoint. One that is equal to the last one costs nothing.
	Checkpoint []byte
	Result     *appraise.Result // Received and Expires are taken from it
	// Evidence is kept where the result is not affirming, of host and all VMs: each
	// time that there is some, so that such rounds are never folded into one.
	Evidence []byte
	// Next becomes the outstanding nonce, until NextExpires; nil for none.
	Next        []byte
	NextExpires time.Time
}

// prepared is what can be known of a Completion before the transaction.
type prepared struct {
	Completion
	digest   [sha256.Size]byte // of the result but for its times and changes
	result   []byte            // that as JSON, and Evidence, compressed, where they will surely be
	evidence []byte            // kept: nobody else has to wait for that
	affirmed bool
	codes    []string
	vms      []appraise.VM
}

func prepare(c Completion) (*prepared, error) {
	switch {
	case c.Result == nil, c.Result.Received.IsZero(), c.Result.Expires.IsZero():
		return nil, fmt.Errorf("%w: a round has a result with its times", ErrInvalid)
	case len(c.Nonce) == 0, len(c.Nonce) > maxNonce, len(c.Next) > maxNonce, len(c.Checkpoint) > MaxCheckpoint, len(c.Evidence) > MaxEvidence:
		return nil, fmt.Errorf("%w: round", ErrInvalid)
	}
	p := &prepared{Completion: c, affirmed: c.Result.Host.Tier == appraise.Affirming}
	p.digest = c.Result.Digest()
	for _, r := range c.Result.Host.Reasons {
		p.codes = append(p.codes, r.Code)
	}
	seen := map[string]bool{}
	for _, vm := range c.Result.VMs {
		if vm.UUID == "" || len(vm.UUID) > maxName || seen[vm.UUID] {
			return nil, fmt.Errorf("%w: a result names each VM once", ErrInvalid)
		}
		if seen[vm.UUID] = true; vm.Tier != appraise.Affirming {
			p.affirmed = false
		}
		for _, r := range vm.Reasons {
			p.codes = append(p.codes, r.Code)
		}
		p.vms = append(p.vms, vm)
	}
	slices.Sort(p.codes)
	p.codes = slices.Compact(p.codes)
	if !p.affirmed && len(c.Evidence) > 0 {
		p.evidence = pack(c.Evidence)
	}
	if p.evidence != nil || len(c.Result.Changes) > 0 {
		if err := p.packResult(); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (p *prepared) packResult() error {
	lasting := *p.Result
	lasting.Received, lasting.Expires, lasting.Changes = time.Time{}, time.Time{}, nil
	b, err := json.Marshal(&lasting)
	if err != nil {
		return fmt.Errorf("result: %w", err)
	}
	p.result = pack(b)
	return nil
}

// CompleteRound is Tx.CompleteRound alone.
func (s *Store) CompleteRound(ctx context.Context, c Completion) (id int64, err error) {
	p, err := prepare(c)
	if err != nil {
		return 0, err
	}
	err = s.Do(ctx, func(tx *Tx) error {
		id, err = tx.complete(ctx, p)
		return err
	})
	return id, err
}

// CompleteRound takes in what came of a round, in whole or not at all: ErrNonce
// where the nonce is not outstanding any more (used, replaced, expired),
// ErrInactive, ErrNotFound. It gives the round's ID. A round without evidence to
// keep, whose result is that of the round before but for its times, prolongs that
// one (Round.Count); all it costs is one small row.
func (tx *Tx) CompleteRound(ctx context.Context, c Completion) (int64, error) {
	p, err := prepare(c)
	if err != nil {
		return 0, err
	}
	return tx.complete(ctx, p)
}

func (tx *Tx) complete(ctx context.Context, p *prepared) (int64, error) {
	id, err := tx.takeRound(ctx, p)
	if err != nil {
		return 0, fmt.Errorf("round of node %s: %w", p.Node, err)
	}
	return id, nil
}

func (tx *Tx) takeRound(ctx context.Context, p *prepared) (int64, error) {
	var (
		state          fleet.NodeState
		nonce, digest  []byte
		expires        time.Time
		id, count      int64
		last, lastEnds time.Time
	)
	q := "SELECT n.state, s.nonce, s.nonce_expires, s.round, s.count, s.received, s.expires, s.result_digest FROM node_state s JOIN nodes n ON n.id = s.node WHERE s.node = ?"
	if tx.d.numbered {
		q += " FOR UPDATE OF s"
	}
	err := tx.one(ctx, q, []any{p.Node}, &state, &nonce, at{&expires}, &id, &count, at{&last}, at{&lastEnds}, &digest)
	switch {
	case err != nil:
		return 0, err
	case state != fleet.Active:
		return 0, ErrInactive
	case len(nonce) == 0, !bytes.Equal(nonce, p.Nonce), !expires.After(tx.now()):
		return 0, ErrNonce
	}
	if err := tx.putCheckpoint(ctx, p.Node, p.Checkpoint); err != nil {
		return 0, err
	}
	received, ends := p.Result.Received, p.Result.Expires
	if id != 0 && p.evidence == nil && len(p.Result.Changes) == 0 && bytes.Equal(digest, p.digest[:]) {
		_, err := tx.exec(ctx, `UPDATE node_state SET version = version + 1, nonce = ?, nonce_expires = ?, received = ?, expires = ?, count = count + 1, noticed = 0
 WHERE node = ?`, p.Next, p.NextExpires, received, ends, p.Node)
		return id, err
	}
	if count > 1 {
		if _, err := tx.exec(ctx, "UPDATE rounds SET last = ?, expires = ?, count = ? WHERE id = ?", last, lastEnds, count, id); err != nil {
			return 0, err
		}
	}
	if id, err = tx.addRound(ctx, p); err != nil {
		return 0, err
	}
	if !bytes.Equal(digest, p.digest[:]) {
		if err := tx.updateVMs(ctx, p); err != nil {
			return 0, err
		}
	}
	tier := map[appraise.Tier]int{}
	for _, vm := range p.vms {
		tier[known(vm.Tier)]++
	}
	_, err = tx.exec(ctx, `UPDATE node_state SET version = version + 1, nonce = ?, nonce_expires = ?, round = ?, received = ?, expires = ?, count = 1, tier = ?,
 vm_none = ?, vm_affirming = ?, vm_warning = ?, vm_contra = ?, result_digest = ?, noticed = 0 WHERE node = ?`,
		p.Next, p.NextExpires, id, received, ends, known(p.Result.Host.Tier),
		tier[appraise.None], tier[appraise.Affirming], tier[appraise.Warning], tier[appraise.Contraindicated], p.digest[:], p.Node)
	return id, err
}

// known makes None of any other tier, as Tier.String does.
func known(t appraise.Tier) appraise.Tier {
	switch t {
	case appraise.Affirming, appraise.Warning, appraise.Contraindicated:
		return t
	}
	return appraise.None
}

func (tx *Tx) putCheckpoint(ctx context.Context, node string, data []byte) error {
	if len(data) == 0 {
		_, err := tx.exec(ctx, "DELETE FROM checkpoints WHERE node = ?", node)
		return err
	}
	digest := sha256.Sum256(data)
	var have []byte
	err := tx.one(ctx, "SELECT digest FROM checkpoints WHERE node = ?", []any{node}, &have)
	if err == nil && bytes.Equal(have, digest[:]) {
		return nil
	} else if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	_, err = tx.exec(ctx, "INSERT INTO checkpoints (node, digest, data) VALUES (?, ?, ?) ON CONFLICT (node) DO UPDATE SET digest = excluded.digest, data = excluded.data",
		node, digest[:], data)
	return err
}

func (tx *Tx) addRound(ctx context.Context, p *prepared) (int64, error) {
	if p.result == nil {
		if err := p.packResult(); err != nil {
			return 0, err
		}
	}
	var changes []byte
	if len(p.Result.Changes) > 0 {
		changes = pack(toJSON(p.Result.Changes))
	}
	vmTiers := make(map[string]string, len(p.vms))
	for _, vm := range p.vms {
		vmTiers[vm.UUID] = vm.Tier.String()
	}
	var id int64
	err := tx.one(ctx, `INSERT INTO rounds (node, received, last, expires, count, tier, affirmed, vm_tiers, codes, changes, result)
 VALUES (?, ?, ?, ?, 1, ?, ?, ?, ?, ?, ?) RETURNING id`, []any{p.Node, p.Result.Received, p.Result.Received, p.Result.Expires,
		known(p.Result.Host.Tier), p.affirmed, toJSON(vmTiers), toJSON(p.codes), changes, p.result}, &id)
	if err != nil {
		return 0, err
	}
	if len(p.vms) > 0 {
		uuids := make([]string, len(p.vms))
		for i, vm := range p.vms {
			uuids[i] = vm.UUID
		}
		// The cast tells PostgreSQL what the parameter is.
		if _, err := tx.exec(ctx, "INSERT INTO round_vms (uuid, round) SELECT u.value, CAST(? AS BIGINT) FROM "+tx.d.eachJSON+" u", id, jsonStrings(uuids)); err != nil {
			return 0, err
		}
	}
	if p.evidence != nil {
		_, err = tx.exec(ctx, "INSERT INTO evidence (round, node, received, size, data) VALUES (?, ?, ?, ?, ?)", id, p.Node, p.Result.Received, len(p.evidence), p.evidence)
	}
	return id, err
}

// updateVMs writes the node's rows in vms that differ.
func (tx *Tx) updateVMs(ctx context.Context, p *prepared) error {
	type row struct {
		name, ek string
		running  bool
		tier     appraise.Tier
	}
	have := map[string]row{}
	err := tx.each(ctx, "SELECT uuid, name, ek_digest, running, tier FROM vms WHERE node = ?", []any{p.Node}, func(scan func(...any) error) error {
		var uuid string
		var v row
		err := scan(&uuid, &v.name, &v.ek, &v.running, &v.tier)
		have[uuid] = v
		return err
	})
	if err != nil {
		return err
	}
	for _, vm := range p.vms {
		uuid := fleet.CleanText(vm.UUID)
		v := row{fleet.CleanText(vm.Name), fleet.CleanText(vm.EK), vm.Running, known(vm.Tier)}
		old, ok := have[uuid]
		if delete(have, uuid); ok && old == v {
			continue
		}
		_, err := tx.exec(ctx, `INSERT INTO vms (uuid, node, name, running, ek_digest, tier, changed) VALUES (?, ?, ?, ?, ?, ?, ?)
 ON CONFLICT (uuid, node) DO UPDATE SET name = excluded.name, running = excluded.running, ek_digest = excluded.ek_digest, tier = excluded.tier, changed = excluded.changed`,
			uuid, p.Node, v.name, v.running, v.ek, v.tier, p.Result.Received)
		if err != nil {
			return err
		}
	}
	for uuid := range have {
		// Where it was counts if somebody has taught what it is.
		if _, err := tx.exec(ctx, `INSERT INTO vm_left (uuid, node, ek_digest, gone) SELECT uuid, node, ek_digest, CAST(? AS BIGINT) FROM vms
 WHERE uuid = ? AND node = ? AND EXISTS (SELECT 1 FROM value_versions WHERE subject = uuid)
 ON CONFLICT (uuid) DO UPDATE SET node = excluded.node, ek_digest = excluded.ek_digest, gone = excluded.gone`, p.Result.Received, uuid, p.Node); err != nil {
			return err
		}
		if _, err := tx.exec(ctx, "DELETE FROM vms WHERE uuid = ? AND node = ?", uuid, p.Node); err != nil {
			return err
		}
	}
	return nil
}

// pack compresses what is kept.
func pack(b []byte) []byte {
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	if err == nil {
		if _, err = w.Write(b); err == nil {
			err = w.Close()
		}
	}
	if err != nil {
		panic(err) // into memory
	}
	return out.Bytes()
}

// unpack gives at most limit bytes.
func unpack(b []byte, limit int64) ([]byte, error) {
	if len(b) == 0 {
		return nil, nil
	}
	r, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("kept data: %w", err)
	}
	out, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fmt.Errorf("kept data: %w", err)
	}
	if int64(len(out)) > limit {
		return nil, fmt.Errorf("kept data: %w", ErrInvalid)
	}
	return out, nil
}

// RoundFilter chooses rounds; zero fields choose all.
type RoundFilter struct {
	Node        string
	VM          string // rounds that name this VM
	NotAffirmed bool
	Since       time.Time
}

// A run of rounds that is a node's newest has its end in node_state.
const roundColumns = `r.id, r.node, r.received, COALESCE(s.received, r.last), COALESCE(s.count, r.count), COALESCE(s.expires, r.expires), r.tier, r.vm_tiers, r.codes, r.changes`

const fromRounds = ` FROM rounds r LEFT JOIN node_state s ON s.node = r.node AND s.round = r.id`

func readRound(scan func(...any) error, v *fleet.Round, more ...any) error {
	var tier appraise.Tier
	var changes []byte
	err := scan(append([]any{&v.ID, &v.Node, at{&v.Received}, at{&v.Last}, &v.Count, at{&v.Expires}, &tier, asJSON{&v.VMTiers}, asJSON{&v.Codes}, &changes}, more...)...)
	if err != nil {
		return err
	}
	v.HostTier = tier.String()
	v.Changes, err = unpack(changes, maxResult)
	return err
}

// Rounds gives rounds, newest first, without Evidence and Result.
func (r reads) Rounds(ctx context.Context, f RoundFilter, p Page) ([]fleet.Round, string, error) {
	before, err := p.before()
	if err != nil {
		return nil, "", err
	}
	var c conditions
	c.add("r.id < ?", before)
	if f.Node != "" {
		c.add("r.node = ?", f.Node)
	}
	if f.VM != "" {
		c.add("r.id IN (SELECT round FROM round_vms WHERE uuid = ?)", f.VM)
	}
	if f.NotAffirmed {
		c.add("r.affirmed = 0")
	}
	if !f.Since.IsZero() {
		c.add("COALESCE(s.received, r.last) >= ?", f.Since)
	}
	all, err := list(ctx, r, "SELECT "+roundColumns+fromRounds+c.String()+" ORDER BY r.id DESC LIMIT ?", append(c.args, p.limit()+1),
		func(scan func(...any) error, v *fleet.Round) error { return readRound(scan, v) })
	if err != nil {
		return nil, "", fmt.Errorf("rounds: %w", err)
	}
	all, next := paged(all, p, func(v fleet.Round) string { return cursor(fmt.Sprint(v.ID)) })
	return all, next, nil
}

// Round gives one round with all that was kept of it; ErrNotFound.
func (r reads) Round(ctx context.Context, id int64) (fleet.Round, error) {
	v, err := r.round(ctx, id)
	if err != nil {
		return fleet.Round{}, fmt.Errorf("round %d: %w", id, err)
	}
	return v, nil
}

func (r reads) round(ctx context.Context, id int64) (v fleet.Round, err error) {
	var result, evidence []byte
	err = r.each(ctx, "SELECT "+roundColumns+", r.result, e.data"+fromRounds+" LEFT JOIN evidence e ON e.round = r.id WHERE r.id = ?", []any{id},
		func(scan func(...any) error) error { return readRound(scan, &v, &result, &evidence) })
	switch {
	case err != nil:
		return v, err
	case v.ID == 0:
		return v, ErrNotFound
	}
	if v.Evidence, err = unpack(evidence, MaxEvidence); err != nil {
		return v, err
	}
	var res appraise.Result
	if b, err := unpack(result, maxResult); err != nil || json.Unmarshal(b, &res) != nil {
		return v, errors.Join(errors.New("the result that was kept cannot be read"), err)
	}
	// As it was at the end of the run.
	if res.Received, res.Expires = v.Last, v.Expires; len(v.Changes) > 0 {
		if err := json.Unmarshal(v.Changes, &res.Changes); err != nil {
			return v, err
		}
	}
	v.Result = toJSON(&res)
	return v, nil
}
