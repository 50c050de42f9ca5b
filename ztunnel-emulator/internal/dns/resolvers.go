package dns

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"time"

	miekg "github.com/miekg/dns"
)

// What resolv.conf(5) allows at most, where the C library stops counting.
const (
	maxServers  = 3
	maxAttempts = 5
)

// Resolvers is what resolv.conf(5) says of the node's resolvers. Its rotate is
// not honoured: the first one is asked first.
type Resolvers struct {
	Servers  []netip.AddrPort // in their order, at most three
	Timeout  time.Duration    // of one server, before the next is asked as well; 0 is five seconds
	Attempts int              // how often a silent server is asked; 0 is two
}

// ReadResolvers reads a file like /etc/resolv.conf. One that is missing, or names
// no server, or one that is no IP address, is an error: ztunnel does not start
// with it either.
func ReadResolvers(path string) (Resolvers, error) {
	const advice = `DNS needs a line "nameserver ADDRESS" there, or none of it: ISTIO_META_DNS_CAPTURE=false`
	file, err := os.ReadFile(path)
	if err != nil {
		return Resolvers{}, fmt.Errorf("%w; %s", err, advice)
	}
	c, err := miekg.ClientConfigFromReader(bytes.NewReader(file))
	if err != nil {
		return Resolvers{}, fmt.Errorf("%s: %w; %s", path, err, advice)
	}
	if len(c.Servers) == 0 {
		return Resolvers{}, fmt.Errorf("%s names no server; %s", path, advice)
	}
	r := Resolvers{Timeout: time.Duration(c.Timeout) * time.Second, Attempts: min(c.Attempts, maxAttempts)}
	for _, server := range c.Servers[:min(len(c.Servers), maxServers)] {
		addr, err := netip.ParseAddr(server)
		if err != nil {
			return Resolvers{}, fmt.Errorf("%s: nameserver %q is no IP address; %s", path, server, advice)
		}
		r.Servers = append(r.Servers, netip.AddrPortFrom(addr.Unmap(), 53))
	}
	return r, nil
}

// NodeOnly returns the servers that can't be reached from a pod, where their
// address is another place: loopback ones (127.0.0.53 is systemd-resolved's),
// the unspecified, and IPv6 link-local ones, whose zone is one of the node's
// links. IPv4 link-local ones are routed, and are many a cloud's resolver.
func (r Resolvers) NodeOnly() []netip.AddrPort {
	var only []netip.AddrPort
	for _, server := range r.Servers {
		a := server.Addr()
		if a.IsLoopback() || a.IsUnspecified() || a.Is6() && a.IsLinkLocalUnicast() {
			only = append(only, server)
		}
	}
	return only
}

// schedule returns how often each server is asked, how long the first has before
// the next is asked as well, and how long all of it may take. The attempts share
// queryTimeout, so that each server has had its turn when it is over.
func (r Resolvers) schedule() (attempts int, turn, total time.Duration) {
	attempts, turn = r.Attempts, r.Timeout
	if attempts <= 0 {
		attempts = 2
	}
	if turn <= 0 {
		turn = queryTimeout
	}
	turns := time.Duration(max(1, len(r.Servers)) * attempts)
	turn = min(turn, queryTimeout/turns)
	return attempts, turn, turn * turns
}
