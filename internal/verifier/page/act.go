package page

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"virt-trust/internal/appraise"
	"virt-trust/internal/verifier/fleet"
	"virt-trust/internal/verifier/operate"
	"virt-trust/internal/verifier/store"
	"virt-trust/internal/verifier/webhook"
)

// Operator is what people may do; *operate.Service, which asks for the role and
// the second person again, and writes the audit log.
type Operator interface {
	Approve(ctx context.Context, a operate.Actor, node string) (fleet.Node, error)
	Learn(ctx context.Context, a operate.Actor, node string, on bool) (fleet.Node, error)
	Reject(ctx context.Context, a operate.Actor, node, why string) (fleet.Node, error)
	Revoke(ctx context.Context, a operate.Actor, node, why string) (fleet.Node, error)
	Dismiss(ctx context.Context, a operate.Actor, node string) (fleet.Node, error)
	ApproveRound(ctx context.Context, a operate.Actor, round int64, refs ...operate.Ref) (operate.Approved, error)
	AddValues(ctx context.Context, a operate.Actor, values []fleet.Value) (operate.Added, error)
	ImportValues(ctx context.Context, a operate.Actor, in operate.Import) (operate.Added, error)
	ApproveValues(ctx context.Context, a operate.Actor, ids ...int64) error
	RejectValues(ctx context.Context, a operate.Actor, ids ...int64) error
	PolicyNow(ctx context.Context, a operate.Actor) (now fleet.Setting, next int64, err error)
	PolicyVersion(ctx context.Context, a operate.Actor, version int64) (fleet.Setting, error)
	PolicyVersions(ctx context.Context, a operate.Actor, p store.Page) ([]operate.PolicyVersion, string, error)
	CheckPolicy(ctx context.Context, a operate.Actor, document []byte) ([]appraise.PolicyChange, int64, error)
	SetPolicy(ctx context.Context, a operate.Actor, document []byte, version int64) (fleet.Setting, error)
	ProposedPolicy(ctx context.Context, a operate.Actor) (fleet.Setting, error)
	ApprovePolicy(ctx context.Context, a operate.Actor, version int64) (fleet.Setting, error)
	RejectPolicy(ctx context.Context, a operate.Actor, version int64) error
	CreateToken(ctx context.Context, a operate.Actor, name string, lifetime time.Duration) (string, fleet.JoinToken, error)
	RevokeToken(ctx context.Context, a operate.Actor, digest string) error
	AddHook(ctx context.Context, a operate.Actor, url string, events []string) (fleet.Hook, error)
	RemoveHook(ctx context.Context, a operate.Actor, id int64) error
	TestHook(ctx context.Context, a operate.Actor, id int64) error
	Revive(ctx context.Context, a operate.Actor, deliveries ...int64) error
}

// maxForm bounds a form without a file, in bytes.
const maxForm = 256 << 10

// done says what a form did, by the code in the address that it leads to: no
// words are taken from there.
func done(code string) string {
	return map[string]string{
		"node-approved":    "The node was let in. Its first round follows.",
		"node-learned":     "What the node shows in its next good round is learned.",
		"node-rejected":    "The node was turned away.",
		"node-revoked":     "The node was revoked. Its result is none from now on.",
		"node-dismissed":   "The problem was put aside.",
		"values-approved":  "The Reference Values count from now on.",
		"values-proposed":  "The Reference Values were proposed. They count once another person approves them.",
		"values-partly":    "What can be used of the CoRIM was taken. Parts of it cannot: the audit log lists them.",
		"values-known":     "All of these Reference Values were there already.",
		"values-rejected":  "The Reference Values count no more.",
		"policy-set":       "The policy counts from now on.",
		"policy-proposed":  "The policy was proposed. It counts once another person approves it.",
		"policy-approved":  "The policy counts from now on.",
		"policy-rejected":  "The proposed policy was dropped.",
		"token-revoked":    "The join token was taken back.",
		"revived":          "The deliveries were queued anew.",
		"hook-removed":     "The webhook was removed, with all that waited for it.",
		"hook-tested":      "The receiver took the test event.",
		"hook-test-failed": "The receiver did not take the test event: see that the address is right, answers with 2xx, and that its network is allowed in verifier.toml.",
	}[code]
}

// actions registers what forms do. An action gives where to lead to, or a view
// for what is shown once; each asks for its role before it reads the form.
func (p *Page) actions() {
	do := func(pattern string, role operate.Role, limit int64, f func(*http.Request, operate.Actor) (string, *view, error)) {
		p.mux.HandleFunc("POST "+pattern, func(w http.ResponseWriter, r *http.Request) {
			a := operate.ActorOf(r.Context())
			switch {
			case a.Role < operate.Reader:
				p.toLogin(w, r)
				return
			case a.Role < role:
				p.fail(w, r, operate.ErrForbidden)
				return
			}
			r.Body = http.MaxBytesReader(w, r.Body, limit)
			// Everything stays in memory, within the limit: no temporary files.
			if err := r.ParseMultipartForm(limit); err != nil && !errors.Is(err, http.ErrNotMultipart) {
				p.fail(w, r, fmt.Errorf("%w: %w", errForm, err))
				return
			}
			to, v, err := f(r, a)
			switch {
			case err != nil:
				p.fail(w, r, err)
			case v != nil:
				p.write(w, r, *v)
			default:
				http.Redirect(w, r, to, http.StatusSeeOther)
			}
		})
	}
	do("/nodes/{node}/approve", operate.Operator, maxForm, func(r *http.Request, a operate.Actor) (string, *view, error) {
		n, err := p.Operator.Approve(r.Context(), a, r.PathValue("node"))
		return back(r, "/nodes/"+n.ID) + "?done=node-approved", nil, err
	})
	do("/nodes/{node}/learn", operate.Operator, maxForm, func(r *http.Request, a operate.Actor) (string, *view, error) {
		n, err := p.Operator.Learn(r.Context(), a, r.PathValue("node"), true)
		return "/nodes/" + n.ID + "?done=node-learned", nil, err
	})
	do("/nodes/{node}/reject", operate.Operator, maxForm, func(r *http.Request, a operate.Actor) (string, *view, error) {
		n, err := p.Operator.Reject(r.Context(), a, r.PathValue("node"), r.PostFormValue("why"))
		return back(r, "/nodes/"+n.ID) + "?done=node-rejected", nil, err
	})
	do("/nodes/{node}/revoke", operate.Operator, maxForm, func(r *http.Request, a operate.Actor) (string, *view, error) {
		n, err := p.Operator.Revoke(r.Context(), a, r.PathValue("node"), r.PostFormValue("why"))
		return "/nodes/" + n.ID + "?done=node-revoked", nil, err
	})
	do("/nodes/{node}/dismiss", operate.Operator, maxForm, func(r *http.Request, a operate.Actor) (string, *view, error) {
		n, err := p.Operator.Dismiss(r.Context(), a, r.PathValue("node"))
		return back(r, "/nodes/"+n.ID) + "?done=node-dismissed", nil, err
	})
	do("/nodes/{node}/rounds/{round}/approve", operate.Operator, maxForm, p.approveRound)
	do("/values/add", operate.Policy, maxForm, func(r *http.Request, a operate.Actor) (string, *view, error) {
		added, err := p.Operator.AddValues(r.Context(), a, []fleet.Value{{
			Subject: field(r, "subject"), Kind: fleet.Kind(field(r, "kind")), Path: r.PostFormValue("path"), Digest: field(r, "digest"), Detail: field(r, "detail"),
		}})
		return "/values?done=" + came(added), nil, err
	})
	do("/values/import", operate.Policy, operate.MaxImport+maxForm, p.importValues)
	for verb, f := range map[string]func(context.Context, operate.Actor, ...int64) error{
		"approve": func(ctx context.Context, a operate.Actor, ids ...int64) error {
			return p.Operator.ApproveValues(ctx, a, ids...)
		},
		"reject": func(ctx context.Context, a operate.Actor, ids ...int64) error {
			return p.Operator.RejectValues(ctx, a, ids...)
		},
	} {
		code := map[string]string{"approve": "values-approved", "reject": "values-rejected"}[verb]
		do("/values/"+verb, operate.Policy, maxForm, func(r *http.Request, a operate.Actor) (string, *view, error) {
			ids, err := numbers(r.PostForm["id"])
			if err == nil {
				err = f(r.Context(), a, ids...)
			}
			return back(r, "/values") + "?done=" + code, nil, err
		})
	}
	do("/policy/check", operate.Policy, maxPolicyForm, p.checkPolicy)
	do("/policy/set", operate.Policy, 3*appraise.MaxPolicy+maxForm, p.setPolicy)
	do("/policy/approve", operate.Policy, maxForm, func(r *http.Request, a operate.Actor) (string, *view, error) {
		ids, err := numbers(r.PostForm["version"])
		if err == nil {
			_, err = p.Operator.ApprovePolicy(r.Context(), a, ids[0])
		}
		return "/approvals?done=policy-approved", nil, err
	})
	do("/policy/reject", operate.Policy, maxForm, func(r *http.Request, a operate.Actor) (string, *view, error) {
		ids, err := numbers(r.PostForm["version"])
		if err == nil {
			err = p.Operator.RejectPolicy(r.Context(), a, ids[0])
		}
		return "/approvals?done=policy-rejected", nil, err
	})
	do("/tokens", operate.Operator, maxForm, p.createToken)
	do("/tokens/revoke", operate.Operator, maxForm, func(r *http.Request, a operate.Actor) (string, *view, error) {
		return "/tokens?done=token-revoked", nil, p.Operator.RevokeToken(r.Context(), a, field(r, "digest"))
	})
	do("/webhooks", operate.Policy, maxForm, func(r *http.Request, a operate.Actor) (string, *view, error) {
		h, err := p.Operator.AddHook(r.Context(), a, field(r, "url"), r.PostForm["event"])
		if err != nil {
			return "", nil, err
		}
		return "", &view{name: "hookmade", title: "The webhook's secret", data: hookMade{h, webhook.EncodeSecret(h.Secret)}}, nil
	})
	do("/deliveries/revive", operate.Policy, maxForm, func(r *http.Request, a operate.Actor) (string, *view, error) {
		ids, err := numbers(r.PostForm["id"])
		if err == nil {
			err = p.Operator.Revive(r.Context(), a, ids...)
		}
		return "/webhooks?done=revived", nil, err
	})
	do("/webhooks/{hook}/remove", operate.Policy, maxForm, func(r *http.Request, a operate.Actor) (string, *view, error) {
		id, err := numbers([]string{r.PathValue("hook")})
		if err == nil {
			err = p.Operator.RemoveHook(r.Context(), a, id[0])
		}
		return "/webhooks?done=hook-removed", nil, err
	})
	do("/webhooks/{hook}/test", operate.Policy, maxForm, func(r *http.Request, a operate.Actor) (string, *view, error) {
		id, err := numbers([]string{r.PathValue("hook")})
		if err != nil {
			return "", nil, err
		}
		err = p.Operator.TestHook(r.Context(), a, id[0])
		if err != nil && !ours(err) {
			return "/webhooks?done=hook-test-failed", nil, nil
		}
		return "/webhooks?done=hook-tested", nil, err
	})
}

// ours says whether an error is about the request, not a webhook's receiver.
func ours(err error) bool {
	return slices.ContainsFunc([]error{operate.ErrUnauthenticated, operate.ErrForbidden, operate.ErrNotFound, operate.ErrConflict, operate.ErrInvalid,
		operate.ErrSamePerson, store.ErrUnavailable, store.ErrNotFound}, func(e error) bool { return errors.Is(err, e) })
}

type hookMade struct {
	fleet.Hook
	Spelt string // its secret
}

// field is a form's, without spaces around it.
func field(r *http.Request, name string) string { return strings.TrimSpace(r.PostFormValue(name)) }

// back is where a form that stands on several pages leads to: the page for
// approvals, or its own.
func back(r *http.Request, otherwise string) string {
	if r.PostFormValue("back") == "/approvals" {
		return "/approvals"
	}
	return otherwise
}

func numbers(texts []string) ([]int64, error) {
	var ids []int64
	for _, t := range texts {
		n, err := strconv.ParseInt(t, 10, 64)
		if err != nil || n <= 0 {
			return nil, fmt.Errorf("%w: a number is wanted", errForm)
		}
		ids = append(ids, n)
	}
	if len(ids) == 0 {
		return nil, fmt.Errorf("%w: nothing was chosen", errForm)
	}
	return ids, nil
}

// came says by which code adding values ended.
func came(a operate.Added) string {
	switch {
	case len(a.Ignored) > 0:
		return "values-partly"
	case a.New == 0:
		return "values-known"
	case a.State == fleet.Proposed:
		return "values-proposed"
	}
	return "values-approved"
}

// approveRound takes the findings that were ticked: of this very round, never
// "all of what is there now".
func (p *Page) approveRound(r *http.Request, a operate.Actor) (string, *view, error) {
	round, err := p.round(r.Context(), r.PathValue("node"), r.PathValue("round"))
	if err != nil {
		return "", nil, err
	}
	var refs []operate.Ref
	for _, t := range r.PostForm["ref"] {
		subject, n, _ := strings.Cut(t, ":")
		i, err := strconv.Atoi(n)
		if err != nil || i < 0 {
			return "", nil, fmt.Errorf("%w: a finding is wanted", errForm)
		}
		refs = append(refs, operate.Ref{Subject: subject, Reason: i})
	}
	if len(refs) == 0 {
		return "", nil, fmt.Errorf("%w: nothing was chosen", errForm)
	}
	done, err := p.Operator.ApproveRound(r.Context(), a, round.ID, refs...)
	return fmt.Sprintf("/nodes/%s/rounds/%d?done=%s", round.Node, round.ID, came(done.Added)), nil, err
}

func (p *Page) importValues(r *http.Request, a operate.Actor) (string, *view, error) {
	in := operate.Import{Format: field(r, "format"), Subject: field(r, "subject"), Kind: fleet.Kind(field(r, "kind")), Name: field(r, "name")}
	switch in.Format {
	case operate.FormatValues, operate.FormatManifest:
		in.Subject, in.Kind, in.Name = "", "", "" // the file says
	case operate.FormatCoRIM, operate.FormatUnsignedCoRIM:
		in.Kind, in.Name = "", ""
	}
	var err error
	if in.Content, err = upload(r, "file"); err != nil {
		return "", nil, err
	}
	if len(in.Content) == 0 {
		in.Content = []byte(r.PostFormValue("content"))
	}
	if len(in.Content) == 0 {
		return "", nil, fmt.Errorf("%w: choose a file, or paste its content", errForm)
	}
	if in.Signature, err = upload(r, "signature"); err != nil {
		return "", nil, err
	}
	// A signature is binary, or base64 as openssl and others print it.
	if b, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(string(in.Signature)), "")); err == nil && len(b) > 0 {
		in.Signature = b
	}
	added, err := p.Operator.ImportValues(r.Context(), a, in)
	return "/values?done=" + came(added), nil, err
}

func upload(r *http.Request, name string) ([]byte, error) {
	f, _, err := r.FormFile(name)
	if errors.Is(err, http.ErrMissingFile) || errors.Is(err, http.ErrNotMultipart) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errForm, err)
	}
	defer f.Close()
	return io.ReadAll(f)
}

type tokenMade struct {
	fleet.JoinToken
	Secret string
	Server string // where the node goes
}

// createToken answers with the token itself: it is shown once and is in no
// address.
func (p *Page) createToken(r *http.Request, a operate.Actor) (string, *view, error) {
	hours, err := strconv.Atoi(field(r, "hours"))
	if err != nil || hours <= 0 || hours > int(operate.MaxTokenLifetime/time.Hour) {
		return "", nil, fmt.Errorf("%w: a token is good for 1 to %d hours", errForm, int(operate.MaxTokenLifetime/time.Hour))
	}
	secret, t, err := p.Operator.CreateToken(r.Context(), a, field(r, "name"), time.Duration(hours)*time.Hour)
	if err != nil {
		return "", nil, err
	}
	server := r.Host
	if p.Nodes != nil {
		server = cmp.Or(p.Nodes(), server)
	}
	return "", &view{name: "tokenmade", title: "The join token", data: tokenMade{t, secret, server}}, nil
}

type approvalsView struct {
	Pending  []pendingNode
	Values   []valueRow
	More     bool // there are more values than are shown
	Problems []fleet.Status
	Changes  []row // hosts whose newest round shows what could be approved
	Policy   *fleet.Setting
	Mine     bool // the policy was proposed by who looks
	// What the proposed policy would change, or why it is none; and its text.
	PolicyChanges []appraise.PolicyChange
	PolicyWrong   string
	PolicyText    string
	FourEyes      bool
}

type pendingNode struct {
	fleet.Status
	EK []fact
}

type valueRow struct {
	fleet.Value
	Whose string // the subject in words
	Href  string
	Mine  bool // proposed by who looks, so that another person is wanted
}

func (p *Page) approvalsPage(r *http.Request) (view, error) {
	ctx, a := r.Context(), operate.ActorOf(r.Context())
	d := approvalsView{FourEyes: p.FourEyes}
	sum, err := p.Store.Summary(ctx)
	if err != nil {
		return view{}, err
	}
	nodes, _, err := p.Store.Nodes(ctx, store.NodeFilter{State: fleet.Pending}, store.Page{Limit: 100})
	if err != nil {
		return view{}, err
	}
	for _, n := range nodes {
		d.Pending = append(d.Pending, pendingNode{n, certificate(n.EKCertificate)})
	}
	vs, next, err := p.Store.Values(ctx, store.ValueFilter{State: fleet.Proposed}, store.Page{Limit: 200})
	if err != nil {
		return view{}, err
	}
	d.Values, d.More = p.valueRows(ctx, vs, a), next != ""
	if d.Problems, _, err = p.Store.Nodes(ctx, store.NodeFilter{Problem: true}, store.Page{Limit: 50}); err != nil {
		return view{}, err
	}
	d.Problems = slices.DeleteFunc(d.Problems, func(n fleet.Status) bool { return n.State == fleet.Revoked })
	if d.Changes, err = p.changedHosts(ctx, sum); err != nil {
		return view{}, err
	}
	if d.Policy, err = p.proposed(ctx, a); err != nil {
		return view{}, err
	}
	if s := d.Policy; s != nil {
		d.Mine, d.PolicyText = fleet.SamePerson(s.By, a.Name), says(s.Data)
		d.PolicyChanges, _, err = p.Operator.CheckPolicy(ctx, a, s.Data)
		if errors.Is(err, operate.ErrInvalid) {
			d.PolicyWrong, err = err.Error(), nil
		}
		if err != nil {
			return view{}, err
		}
	}
	return view{name: "approvals", title: "Approvals", data: d}, nil
}

// changedHosts gives hosts whose newest rounds show, of themselves or of a VM,
// what a Reference Value could be made of; of very many, some.
func (p *Page) changedHosts(ctx context.Context, sum fleet.Summary) ([]row, error) {
	const most = 25
	var out []row
	seen := map[string]bool{}
	add := func(n fleet.Status) {
		if !seen[n.ID] && len(out) < most && slices.ContainsFunc(n.Codes, approvableCode) {
			out = append(out, row{Status: n})
		}
		seen[n.ID] = true
	}
	for _, t := range []appraise.Tier{appraise.Contraindicated, appraise.Warning} {
		if sum.ByTier[t] > 0 { // the store goes through all where there is none
			nodes, _, err := p.Store.Nodes(ctx, store.NodeFilter{State: fleet.Active, Tier: &t}, store.Page{Limit: most})
			if err != nil {
				return nil, err
			}
			for _, n := range nodes {
				add(n)
			}
		}
		if sum.VMs[t] == 0 || len(out) == most {
			continue
		}
		vms, _, err := p.Store.VMs(ctx, store.VMFilter{Tier: &t}, store.Page{Limit: 4 * most})
		if err != nil {
			return nil, err
		}
		for _, v := range vms {
			if seen[v.Node] || len(out) == most {
				continue
			}
			n, err := p.Store.Status(ctx, v.Node)
			if err != nil {
				return nil, err
			}
			add(n)
		}
	}
	return out, nil
}

// approvableCode says whether a Reference Value can be what a reason lacks; the
// round's page knows of which.
func approvableCode(code string) bool {
	switch code {
	case appraise.CodeEventUnknown, appraise.CodeIMAUnknown, appraise.CodeIMAChanged, appraise.CodeIMAWithdrawn, appraise.CodeLauncherUnknown,
		appraise.CodeHostPCR, appraise.CodeVMPCR, appraise.CodeLaunchBefore:
		return true
	}
	return false
}

// valueRows names the subjects of values; a node that is gone keeps its ID.
func (p *Page) valueRows(ctx context.Context, vs []fleet.Value, a operate.Actor) []valueRow {
	names := map[string]valueRow{}
	out := make([]valueRow, 0, len(vs))
	for _, v := range vs {
		w, ok := names[v.Subject]
		if !ok {
			w = valueRow{Whose: v.Subject}
			switch {
			case v.Subject == "":
				w.Whose = "all"
			case strings.HasPrefix(v.Subject, "group:"):
				w.Whose = "group " + strings.TrimPrefix(v.Subject, "group:")
			default:
				if n, err := p.Store.Status(ctx, v.Subject); err == nil {
					w.Whose, w.Href = "host "+n.Name, "/nodes/"+n.ID
				} else if vms, _, err := p.Store.VMs(ctx, store.VMFilter{UUID: v.Subject}, store.Page{Limit: 1}); err == nil && len(vms) > 0 {
					w.Whose, w.Href = "VM "+vms[0].Name, "/nodes/"+vms[0].Node+"/vms/"+vms[0].UUID
				}
			}
			names[v.Subject] = w
		}
		w.Value, w.Mine = v, v.FourEyes && fleet.SamePerson(v.By, a.Name)
		out = append(out, w)
	}
	return out
}
