package workload

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// authority is what a CONNECT asks for: an address, or if that is not valid, a
// port of a host.
type authority struct {
	addr netip.AddrPort
	host string
	port uint16
}

// maxHost is the length of the longest name in DNS.
const maxHost = 253

func parseAuthority(s string) (authority, error) {
	bad := func(why string) (authority, error) {
		return authority{}, fmt.Errorf("the authority %q is neither ip:port nor host:port: %s", cut(s), why)
	}
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return bad("there is no port")
	}
	port, err := strconv.ParseUint(s[i+1:], 10, 16)
	if err != nil {
		return bad("the port is no number up to 65535")
	}
	host := s[:i]
	inner, bracketed := strings.CutPrefix(host, "[")
	if bracketed {
		inner, bracketed = strings.CutSuffix(inner, "]")
	}
	if ip, err := parseIP(inner); err == nil && bracketed == ip.Is6() {
		return authority{addr: netip.AddrPortFrom(ip.Unmap(), uint16(port))}, nil
	}
	if host == "" || len(host) > maxHost || strings.ContainsFunc(host, notHost) {
		return bad("that is no host")
	}
	return authority{host: host, port: uint16(port)}, nil
}

func notHost(r rune) bool {
	return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("-._*", r))
}

// cut keeps what a peer has sent from filling the log.
func cut(s string) string {
	if len(s) > maxHost {
		return s[:maxHost] + "…"
	}
	return s
}
