package workload

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// NetworkAddress is an IP address on a network. Addresses of different networks
// have nothing to do with each other.
type NetworkAddress struct {
	Network string
	IP      netip.Addr
}

// String is the form of the file: network/ip, and /ip on the default network.
func (a NetworkAddress) String() string { return a.Network + "/" + a.IP.String() }

// MarshalText is String.
func (a NetworkAddress) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

func parseNetworkAddress(s string) (NetworkAddress, error) {
	network, text, ok := strings.Cut(s, "/")
	if !ok {
		if _, err := parseIP(s); err == nil {
			return NetworkAddress{}, fmt.Errorf("%q names no network; write %q for the default one", s, "/"+s)
		}
		return NetworkAddress{}, fmt.Errorf("%q is no network/ip, such as %q", s, "/10.96.0.10")
	}
	ip, err := parseIP(text)
	if err != nil {
		return NetworkAddress{}, err
	}
	return NetworkAddress{network, ip}, nil
}

func parseIP(s string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(s)
	if err != nil || ip.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%q is no IP address", s)
	}
	return ip, nil
}

// NamespacedHostname is the key of a service.
type NamespacedHostname struct{ Namespace, Hostname string }

func (h NamespacedHostname) String() string { return h.Namespace + "/" + h.Hostname }

// MarshalText is String.
func (h NamespacedHostname) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

func parseNamespacedHostname(s string) (NamespacedHostname, error) {
	namespace, hostname, ok := strings.Cut(s, "/")
	if !ok || strings.Contains(hostname, "/") {
		return NamespacedHostname{}, fmt.Errorf("%q is no namespace/hostname, such as %q", s, "demo/bob.demo.svc.cluster.local")
	}
	return NamespacedHostname{namespace, hostname}, nil
}

// Gateway refers to a waypoint or a network gateway: by address, or if that is
// not valid, by hostname.
type Gateway struct {
	Addr NetworkAddress
	Host NamespacedHostname
	Port uint16 // for HBONE
}

// Destination is the reference as it is written.
func (g *Gateway) Destination() string {
	if g.Addr.IP.IsValid() {
		return g.Addr.String()
	}
	return g.Host.String()
}

// MarshalJSON is the form of the file.
func (g *Gateway) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Destination string `json:"destination"`
		Port        uint16 `json:"hboneMtlsPort"`
	}{g.Destination(), g.Port})
}

func parseGateway(destination string, port uint16) (*Gateway, error) {
	if a, err := parseNetworkAddress(destination); err == nil {
		return &Gateway{Addr: a, Port: port}, nil
	}
	h, err := parseNamespacedHostname(destination)
	if err != nil {
		return nil, errors.New(err.Error() + ", and no network/ip")
	}
	return &Gateway{Host: h, Port: port}, nil
}

// CIDR is a range of addresses on a network.
type CIDR struct {
	Network string       `json:"network"`
	Prefix  netip.Prefix `json:"cidr"`
}
