package workload

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
)

// Match is what a connection is compared with: each kind of field that is set
// must agree. One of a list must, and none of a Not list.
type Match struct {
	Namespaces          []StringMatch    `json:"namespaces,omitempty"`
	NotNamespaces       []StringMatch    `json:"notNamespaces,omitempty"`
	ServiceAccounts     []ServiceAccount `json:"serviceAccounts,omitempty"`
	NotServiceAccounts  []ServiceAccount `json:"notServiceAccounts,omitempty"`
	Principals          []StringMatch    `json:"principals,omitempty"`
	NotPrincipals       []StringMatch    `json:"notPrincipals,omitempty"`
	SourceIPs           []netip.Prefix   `json:"sourceIps,omitempty"`
	NotSourceIPs        []netip.Prefix   `json:"notSourceIps,omitempty"`
	DestinationIPs      []netip.Prefix   `json:"destinationIps,omitempty"`
	NotDestinationIPs   []netip.Prefix   `json:"notDestinationIps,omitempty"`
	DestinationPorts    []uint16         `json:"destinationPorts,omitempty"`
	NotDestinationPorts []uint16         `json:"notDestinationPorts,omitempty"`
}

// ServiceAccount names one in whatever trust domain.
type ServiceAccount struct {
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
}

// StringMatch compares a string with Value in the way that Kind says.
type StringMatch struct {
	Kind  MatchKind
	Value string // unused with Presence
}

// MatchKind is a way to compare strings.
type MatchKind string

// The kinds. Presence asks for any string but the empty one.
const (
	Exact    MatchKind = "Exact"
	Prefix   MatchKind = "Prefix"
	Suffix   MatchKind = "Suffix"
	Presence MatchKind = "Presence"
)

func (m StringMatch) matches(s string) bool {
	switch m.Kind {
	case Exact:
		return s == m.Value
	case Prefix:
		return strings.HasPrefix(s, m.Value)
	case Suffix:
		return strings.HasSuffix(s, m.Value)
	case Presence:
		return s != ""
	}
	return false
}

// MarshalJSON is the form of the configuration dump: {"Exact":"x"}.
func (m StringMatch) MarshalJSON() ([]byte, error) {
	var value any = m.Value
	if m.Kind == Presence {
		value = []string{}
	}
	return json.Marshal(map[MatchKind]any{m.Kind: value})
}

// empty tells whether nothing is set at all.
func (m *Match) empty() bool {
	return len(m.Namespaces)+len(m.NotNamespaces)+
		len(m.ServiceAccounts)+len(m.NotServiceAccounts)+
		len(m.Principals)+len(m.NotPrincipals)+
		len(m.SourceIPs)+len(m.NotSourceIPs)+
		len(m.DestinationIPs)+len(m.NotDestinationIPs)+
		len(m.DestinationPorts)+len(m.NotDestinationPorts) == 0
}

// matches judges a connection. A match with nothing set matches nothing.
func (m *Match) matches(c *subject) bool {
	return agree(m.Namespaces, m.NotNamespaces, func(s StringMatch) bool { return s.matches(c.id.namespace) }) &&
		agree(m.ServiceAccounts, m.NotServiceAccounts, func(a ServiceAccount) bool {
			return c.known && a.Namespace == c.id.namespace && a.ServiceAccount == c.id.serviceAccount
		}) &&
		agree(m.Principals, m.NotPrincipals, func(s StringMatch) bool { return c.known && s.matches(c.principal) }) &&
		agree(m.SourceIPs, m.NotSourceIPs, func(p netip.Prefix) bool { return p.Contains(c.src) }) &&
		agree(m.DestinationIPs, m.NotDestinationIPs, func(p netip.Prefix) bool { return p.Contains(c.dst.Addr()) }) &&
		agree(m.DestinationPorts, m.NotDestinationPorts, func(p uint16) bool { return p == c.dst.Port() }) &&
		!m.empty()
}

// agree judges one kind of field.
func agree[T any](some, none []T, matches func(T) bool) bool {
	return (len(some) == 0 || slices.ContainsFunc(some, matches)) && !slices.ContainsFunc(none, matches)
}

// subject is a connection, taken apart for the matchers.
type subject struct {
	src       netip.Addr
	dst       netip.AddrPort
	id        identity
	known     bool // whether there is an identity
	principal string
}
