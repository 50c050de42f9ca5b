package workload

// Service is a name for workloads. It has virtual addresses, or none at all
// (headless).
type Service struct {
	Name             string               `json:"name"`
	Namespace        string               `json:"namespace"`
	Hostname         string               `json:"hostname"`
	VIPs             []NetworkAddress     `json:"vips"`
	CIDRVIPs         []CIDR               `json:"cidrVips,omitempty"`
	Ports            map[uint16]uint16    `json:"ports"` // service port -> target port, 0: named, and so each endpoint's own
	Endpoints        map[string]*Endpoint `json:"endpoints"`
	SubjectAltNames  []string             `json:"subjectAltNames"`
	Waypoint         *Gateway             `json:"waypoint,omitempty"`
	WeightedWaypoint []WeightedWaypoint   `json:"weightedWaypoints,omitempty"`
	LoadBalancer     *LoadBalancer        `json:"loadBalancer,omitempty"`
	IPFamilies       IPFamilies           `json:"ipFamilies,omitempty"`
	Canonical        bool                 `json:"canonical"`
	Visibility       Visibility           `json:"visibility"`

	// reachable are the endpoints whose workload is known, by uid. What is chosen
	// at random is chosen from a list that has an order.
	reachable []endpoint
	// identities are the SubjectAltNames that are identities.
	identities []string
}

// Endpoint is a workload as the target of a service.
type Endpoint struct {
	WorkloadUID string            `json:"workloadUid"`
	Ports       map[uint16]uint16 `json:"port"` // service port -> target port
	Status      Health            `json:"status"`
}

type endpoint struct {
	*Endpoint
	workload *Workload
}

// WeightedWaypoint is one of several waypoints, among which each connection
// chooses.
type WeightedWaypoint struct {
	Gateway *Gateway `json:"destination"`
	Weight  uint32   `json:"weight"`
}

// LoadBalancer says which endpoints of a service are good for a source.
type LoadBalancer struct {
	Preferences []Scope      `json:"routingPreferences"`
	Mode        BalanceMode  `json:"mode"`
	Health      HealthPolicy `json:"healthPolicy"`
}

// Scope is something that a source and an endpoint may have in common.
type Scope string

// The scopes.
const (
	ScopeRegion  Scope = "Region"
	ScopeZone    Scope = "Zone"
	ScopeSubzone Scope = "Subzone"
	ScopeNode    Scope = "Node"
	ScopeCluster Scope = "Cluster"
	ScopeNetwork Scope = "Network"
)

// BalanceMode says what a load balancer's preferences are worth.
type BalanceMode string

// The modes of a load balancer.
const (
	BalanceStandard    BalanceMode = "Standard"    // nothing
	BalanceStrict      BalanceMode = "Strict"      // all must be met
	BalanceFailover    BalanceMode = "Failover"    // those who meet most win
	BalancePassthrough BalanceMode = "Passthrough" // no endpoints: the address is the destination
)

// HealthPolicy tells whether a service wants its unhealthy endpoints.
type HealthPolicy string

// The health policies.
const (
	OnlyHealthy HealthPolicy = "OnlyHealthy"
	AllowAll    HealthPolicy = "AllowAll"
)

// IPFamilies restricts the addresses under which the endpoints are reached. The
// zero value is no restriction.
type IPFamilies string

// The restrictions.
const (
	Dual IPFamilies = "Dual"
	IPv4 IPFamilies = "IPv4"
	IPv6 IPFamilies = "IPv6"
)

// Visibility tells who may see a service.
type Visibility string

// The visibilities.
const (
	Public           Visibility = "Public"
	NamespacePrivate Visibility = "Namespace"
)

// Key returns what a service is known by.
func (s *Service) Key() NamespacedHostname { return NamespacedHostname{s.Namespace, s.Hostname} }

// VisibleTo tells whether a client of that namespace may see the service.
func (s *Service) VisibleTo(namespace string) bool {
	return s.Visibility != NamespacePrivate || s.Namespace == namespace
}

func (s *Service) mode() BalanceMode {
	if s.LoadBalancer == nil {
		return BalanceStandard
	}
	return s.LoadBalancer.Mode
}

// takes tells whether an endpoint that a workload contributes becomes one of the
// service's.
func (s *Service) takes(h Health) bool {
	return h == Healthy || s.LoadBalancer != nil && s.LoadBalancer.Health == AllowAll
}
