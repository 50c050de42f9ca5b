package workload

// Policy is an AuthorizationPolicy of the control plane, boiled down.
type Policy struct {
	Name      string      `json:"name"`
	Namespace string      `json:"namespace"`
	Scope     PolicyScope `json:"scope"`
	Action    Action      `json:"action"`
	DryRun    bool        `json:"dryRun"`
	Rules     []Rule      `json:"rules"` // one must match
}

// Rule matches when each of its clauses does, a clause when one of its matches does.
type Rule []Clause

// Clause is a list of alternatives.
type Clause []Match

// PolicyScope is what a policy governs.
type PolicyScope string

// The scopes of policies. The last one governs the workloads that name it.
const (
	ScopeGlobal           PolicyScope = "Global"
	ScopeNamespace        PolicyScope = "Namespace"
	ScopeWorkloadSelector PolicyScope = "WorkloadSelector"
)

// Action is what becomes of what matches.
type Action string

// The actions.
const (
	Allow Action = "Allow"
	Deny  Action = "Deny"
)

// Key is what a workload names a policy by.
func (p *Policy) Key() string { return p.Namespace + "/" + p.Name }
