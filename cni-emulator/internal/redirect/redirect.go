// Package redirect programs a pod so that its traffic goes through ztunnel's
// listeners: nftables rules, a policy rule and a route, for IPv4 and IPv6, as the
// real agent does (reference/redirection.md).
//
// Everything goes over netlink sockets that are opened inside the pod and used
// from outside. What is here is the pod's own or nobody's: Install undoes what it
// could not finish, Remove takes out what Install put in and nothing else, and
// both can be repeated.
package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
)

// Mode is how a pod's traffic is captured.
type Mode string

const (
	// None captures nothing.
	None Mode = "none"
	// Redirect captures both directions with REDIRECT, as Istio does since 1.24.
	// An inbound packet's destination becomes the address of the interface that
	// it came in by, so the listeners have to be on the wildcard address.
	Redirect Mode = "redirect"
	// TProxy captures inbound with TPROXY, as Istio did before 1.24, and outbound
	// with REDIRECT. The listeners may be on 127.0.0.1 and need IP_TRANSPARENT.
	TProxy Mode = "tproxy"
)

// ParseMode reads a mode as a person writes it.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case None, Redirect, TProxy:
		return m, nil
	}
	return "", fmt.Errorf("capture %q: it is none, redirect or tproxy", s)
}

// Config is what is captured in a pod.
type Config struct {
	Mode Mode
	DNS  bool // UDP and TCP port 53 go to 15053
	IPv6 bool // as IPv4; otherwise IPv6 is left alone altogether

	// BypassInbound leaves plaintext inbound alone (ingress mode of the sheet, the
	// annotation ambient.istio.io/bypass-inbound-capture).
	BypassInbound bool
	// VirtualInterfaces are those whose guests' TCP is outbound (the annotation
	// istio.io/reroute-virtual-interfaces).
	VirtualInterfaces []string
}

// Check judges the words of a configuration.
func (c Config) Check() error {
	if c.Mode != Redirect && c.Mode != TProxy {
		return fmt.Errorf("capture %q: rules are of redirect or tproxy", c.Mode)
	}
	for _, name := range c.VirtualInterfaces {
		const most = 15 // IFNAMSIZ, less the zero
		if name == "" || len(name) > most || strings.ContainsFunc(name, notInName) {
			return fmt.Errorf("virtual interface %q: the name of an interface has 1 to %d letters, digits, or any of . _ -", name, most)
		}
	}
	return nil
}

func notInName(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("._-", r)
}

// The numbers of the real system (section 1 of the sheet). They are a contract
// with ztunnel, which has the same ones built in.
const (
	ProxyMark = 0x539 // SO_MARK of every socket that ztunnel makes in a pod
	RouteMark = 0x111 // of connections whose peer is ztunnel over loopback: deliver locally
	MarkMask  = 0xfff // higher bits are somebody else's

	RouteTable   = 100
	RulePriority = 32764 // just before main

	OutboundPort = 15001
	InboundPort  = 15006
	HBONEPort    = 15008 // never redirected: ztunnel listens on it as it is
	DNSPort      = 15053

	dnsZone = 1 // conntrack zone of ztunnel's own DNS queries
)

// Probe4 and Probe6 are the source of the kubelet's probes, as the node's own
// rules write it into them: no pod has such an address.
var (
	Probe4 = netip.AddrFrom4([4]byte{169, 254, 7, 127})
	Probe6 = netip.AddrFrom16([16]byte{0xfd, 0x16, 0x92, 0x54, 0x71, 0x27, 0x13, 0x37, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
)

// Why a pod can't be captured.
var (
	ErrLoopbackOnly = errors.New("listens on loopback only, where REDIRECT does not lead: capture it with tproxy")
	ErrOpaque       = errors.New("listens without IP_TRANSPARENT, and TPROXY passes by such a socket: ztunnel sets it when it has CAP_NET_ADMIN, so run that with sudo")
	ErrGuests       = errors.New("listens on loopback only, where guests behind a virtual interface are not led: their ztunnel listens on the wildcard address")
	ErrLoDown       = errors.New("lo is down in the pod, and captured traffic passes over it")
	ErrTableInUse   = fmt.Errorf("route table %d of the pod has routes of somebody else's", RouteTable)
	ErrForeign      = errors.New("it is not ours, but istio-cni's own or somebody's who took its name: the pod is captured already")
	ErrCapability   = errors.New("which this process lacks")
)

// LoUp is the command that helps against ErrLoDown in the pod whose namespace is at
// path.
func LoUp(path string) string {
	switch filepath.Dir(path) {
	case "/var/run/netns", "/run/netns":
		return "ip -n " + filepath.Base(path) + " link set lo up"
	}
	return "nsenter --net=" + path + " ip link set lo up"
}

// WillReset words a Report's open connections.
func WillReset(open int) string {
	if open == 1 {
		return "1 open connection of the pod will be reset at its next packet"
	}
	return fmt.Sprintf("%d open connections of the pod will be reset at their next packet", open)
}
