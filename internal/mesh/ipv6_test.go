package mesh

import (
	"net/netip"
	"testing"

	"ambient-emulator/internal/worldtest"
)

// Pods of IPv6 have tunnels as those of IPv4 do: to the pod, by a service's address
// and, where a policy denies it, not at all. The application sees who calls.
func TestIPv6(t *testing.T) {
	m := newMesh6(t)
	client, server := m.pod(t, "client", local), m.pod(t, "server", remote)
	stranger := m.pod(t, "stranger", local)
	m.services = service("echo", "fd00:10:96::1", "{80: 8080}")
	server.services = "{default/" + hostname("echo") + ": {80: 8080}}"
	m.policies = deny("no-strangers", stranger.identity())
	m.start(t)
	callers := make(chan netip.Addr, 2)
	server.Serve(t, server.At(8080), func(c *worldtest.Conn) {
		callers <- netip.MustParseAddrPort(c.RemoteAddr().String()).Addr()
		readDoubleWrite(c)
	})
	client.request(t, server.At(8080), hello+hello)
	client.request(t, addr("[fd00:10:96::1]:80"), hello+hello)
	for range 2 {
		if got := <-callers; got != client.ip() {
			t.Errorf("the server is called by %v, want %v", got, client.ip())
		}
	}
	out, in := direct(client, server)
	byVIP, fromVIP := out, in
	byVIP.service, fromVIP.service = hostname("echo"), hostname("echo")
	stranger.isRefused(t, server.At(8080))
	refused, refusal := direct(stranger, server)
	refused.sent, refused.recv, refused.err = 0, 0, "http status: 401 Unauthorized"
	refusal.sent, refusal.recv = 0, 0
	refusal.err = "connection closed due to policy rejection: explicitly denied by: default/no-strangers"
	client.node.says(t, out, byVIP, refused)
	server.node.says(t, in, fromVIP, refusal)
}
