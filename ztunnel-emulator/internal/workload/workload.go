// Package workload is who is who: the workloads, services and policies of the
// local file, and what follows from them for one connection. It opens no
// connection and knows no clock but the file's watcher.
//
// Parse makes a State of a file; a State never changes. Route says where an
// outbound connection goes, InboundTarget where a tunnelled one ends, Authorize
// whether it may. A Store holds the newest State of a file that people edit.
//
// reference/localconfig.md and reference/hbone.md are what this is held against.
package workload

import (
	"net/netip"
	"slices"
	"strings"
)

// PortHBONE is where every workload takes tunnels: ztunnel's 15008.
const PortHBONE = 15008

// The other ports of a pod that belong to ztunnel.
const (
	PortInboundPlain = 15006
	PortOutbound     = 15001
)

// IllegalPort tells whether a connection that ztunnel makes to this port of a
// pod would come back to ztunnel itself.
func IllegalPort(port uint16) bool {
	return port == PortOutbound || port == PortInboundPlain || port == PortHBONE
}

// Protocol is how a workload is reached.
type Protocol string

// The protocols, as the file and the configuration dump spell them.
const (
	TCP   Protocol = "TCP"
	HBONE Protocol = "HBONE"
)

// NetworkMode tells whether a workload has its addresses for itself.
type NetworkMode string

// The network modes. The address of a HostNetwork workload is its node's, and
// says nothing about who it is.
const (
	Standard    NetworkMode = "Standard"
	HostNetwork NetworkMode = "HostNetwork"
)

// Health is what the control plane thinks of a workload or an endpoint.
type Health string

// The states of health.
const (
	Healthy   Health = "Healthy"
	Unhealthy Health = "Unhealthy"
)

// Workload is a pod, or whatever else has an address. Its JSON is its entry in
// ztunnel's configuration dump, and so is that of the types below.
type Workload struct {
	UID            string       `json:"uid,omitempty"`
	Name           string       `json:"name"`
	Namespace      string       `json:"namespace"`
	ServiceAccount string       `json:"serviceAccount,omitempty"`
	TrustDomain    string       `json:"trustDomain,omitempty"`
	IPs            []netip.Addr `json:"workloadIps"`
	Protocol       Protocol     `json:"protocol"`
	NetworkMode    NetworkMode  `json:"networkMode"`
	Network        string       `json:"network,omitempty"`
	Node           string       `json:"node,omitempty"`
	Cluster        string       `json:"clusterId"`
	Status         Health       `json:"status"`
	Capacity       uint32       `json:"capacity"` // its weight among the endpoints of a service

	// Who it is for people: telemetry.
	WorkloadName      string    `json:"workloadName,omitempty"`
	WorkloadType      string    `json:"workloadType,omitempty"`
	CanonicalName     string    `json:"canonicalName,omitempty"`
	CanonicalRevision string    `json:"canonicalRevision,omitempty"`
	Locality          *Locality `json:"locality,omitempty"`

	Hostname              string             `json:"hostname,omitempty"`
	Waypoint              *Gateway           `json:"waypoint,omitempty"`
	NetworkGateway        *Gateway           `json:"networkGateway,omitempty"`
	NativeTunnel          bool               `json:"nativeTunnel,omitempty"`
	ApplicationTunnel     *ApplicationTunnel `json:"applicationTunnel,omitempty"`
	AuthorizationPolicies []string           `json:"authorizationPolicies,omitempty"`

	// services is what the file's key of that name says: the service ports that
	// this workload serves. The real one keeps no list of a workload's services
	// with file configuration, so the dump shows none.
	services map[NamespacedHostname]map[uint16]uint16
}

// Locality is where a workload runs.
type Locality struct {
	Region  string `json:"region"`
	Zone    string `json:"zone"`
	Subzone string `json:"subzone"`
}

// ApplicationTunnel says that the application is a proxy itself, and takes what
// was meant for others.
type ApplicationTunnel struct {
	Protocol TunnelProtocol `json:"protocol"`
	Port     *uint16        `json:"port"` // nil: the port that was asked for
}

// TunnelProtocol is how such an application is told what was asked for.
type TunnelProtocol string

// The tunnel protocols: nothing, or a PROXY header, version 2.
const (
	TunnelNone  TunnelProtocol = "NONE"
	TunnelPROXY TunnelProtocol = "PROXY"
)

// Identity returns the workload's name in certificates.
func (w *Workload) Identity() string {
	return identity{w.TrustDomain, w.Namespace, w.ServiceAccount}.String()
}

// Has tells whether ip is one of the workload's addresses.
func (w *Workload) Has(ip netip.Addr) bool { return slices.Contains(w.IPs, ip) }

func (w *Workload) locality() Locality {
	if w.Locality == nil {
		return Locality{}
	}
	return *w.Locality
}

// rank decides between workloads with the same address: a pod is what it says
// it is, and one in the mesh is known better than one outside.
func (w *Workload) rank() int {
	rank := 0
	if strings.Contains(w.UID, "//Pod/") {
		rank += 2
	}
	if w.Protocol == HBONE {
		rank++
	}
	return rank
}
