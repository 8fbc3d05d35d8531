package webhook

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/store"
)

// Event is the body of a delivery.
type Event struct {
	Type string    `json:"type"`
	Time time.Time `json:"timestamp"`
	Data any       `json:"data"`
}

// Queue puts an event into the queue of each webhook that wants it, with the
// transaction that makes it true.
func Queue(ctx context.Context, tx *store.Tx, e Event) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if _, err := tx.Enqueue(ctx, e.Type, b); err != nil {
		return fmt.Errorf("queueing %s: %w", e.Type, err)
	}
	return nil
}

// NodeData is that of node.pending and node.problem.
type NodeData struct {
	Node    string `json:"node"`
	Name    string `json:"name"`
	Problem string `json:"problem,omitempty"`
}

// Pending makes node.pending.
func Pending(n fleet.Node, now time.Time) Event {
	return Event{NodePending, now, NodeData{n.ID, n.Name, ""}}
}

// Problem makes node.problem.
func Problem(n fleet.Node, problem string, now time.Time) Event {
	return Event{NodeProblem, now, NodeData{n.ID, n.Name, problem}}
}

// Changed is the data of trust.changed, of one subject: "host", or a VM's UUID.
type Changed struct {
	Node     string        `json:"node"`
	NodeName string        `json:"node_name"`
	Subject  string        `json:"subject"`
	Name     string        `json:"name"` // the VM's
	From     appraise.Tier `json:"from"`
	To       appraise.Tier `json:"to"`
	Codes    []string      `json:"codes"` // of the reasons, sorted, each once
}

// TrustChanges makes trust.changed for each subject whose tier differs between
// two results of one node, as they count: before is nil before the first round. A
// VM that is new or gone comes from none, or goes there, and is told of only if
// it stood, or stands, otherwise.
func TrustChanges(n fleet.Node, before, now *appraise.Result, at time.Time) []Event {
	type subject struct {
		name string
		appraise.Appraisal
	}
	subjects := func(r *appraise.Result) map[string]subject {
		all := map[string]subject{}
		if r == nil {
			return all
		}
		all["host"] = subject{n.Name, r.Host}
		for _, v := range r.VMs {
			all[v.UUID] = subject{v.Name, v.Appraisal}
		}
		return all
	}
	was, is := subjects(before), subjects(now)
	names := maps.Clone(was)
	maps.Copy(names, is)
	var events []Event
	for _, s := range slices.Sorted(maps.Keys(names)) {
		if was[s].Tier == is[s].Tier {
			continue
		}
		name := ""
		if s != "host" {
			name = cmp.Or(is[s].name, was[s].name)
		}
		events = append(events, Event{TrustChanged, at, Changed{n.ID, n.Name, s, name, was[s].Tier, is[s].Tier, codes(is[s].Reasons)}})
	}
	return events
}

func codes(reasons []appraise.Reason) []string {
	all := []string{}
	for _, r := range reasons {
		all = append(all, r.Code)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// ExpiredData is the data of result.expired. Until another round every tier of
// the node and its VMs is none.
type ExpiredData struct {
	Node    string        `json:"node"`
	Name    string        `json:"name"`
	Tier    appraise.Tier `json:"tier"` // of the host, before
	Expired time.Time     `json:"expired"`
}

// Expired makes result.expired.
func Expired(e store.Expired, now time.Time) Event {
	return Event{ResultExpired, now, ExpiredData{e.Node, e.Name, e.Tier, e.Expires}}
}

// ProposedData is the data of value.proposed.
type ProposedData struct {
	By      string `json:"by"`
	Subject string `json:"subject"`
	Count   int    `json:"count"`
	What    string `json:"what"` // values, policy
}

// Proposed makes value.proposed.
func Proposed(p ProposedData, now time.Time) Event { return Event{ValueProposed, now, p} }
