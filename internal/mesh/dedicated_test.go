package mesh

import (
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/worldtest"
)

// dedicated takes a pod of a node that shall have a ztunnel of its own: the pod's
// application is in the ztunnel's network namespace, and no agent is needed.
func (m *mesh) dedicated(t *testing.T, on int) *pod {
	t.Helper()
	n := m.node(t, on)
	n.Env = append(n.Env, "PROXY_MODE=dedicated", "PROXY_WORKLOAD_INFO=default/"+n.home.Name+"/"+n.home.Name)
	return n.home
}

// startDedicated starts the ztunnel of a pod, by way of words if there are any. It
// ends, well, with the test.
func (p *pod) startDedicated(t *testing.T, words ...string) {
	t.Helper()
	n := p.node
	words = slices.Concat(words, []string{n.Program}, n.Args)
	n.ZT = worldtest.Start(t, p.NS, n.Env, words[0], words[1:]...)
	n.ZT.Says(t, "\tpod served\t")
	t.Cleanup(func() { n.ZT.End(t, unix.SIGTERM) })
}

// dedicatedOutbound is a dedicated ztunnel as the real cases have it, of a workload
// without tunnels, whose outbound traffic alone is captured.
func (m *mesh) dedicatedOutbound(t *testing.T, on int) *pod {
	t.Helper()
	p := m.dedicated(t, on)
	p.plain = true
	p.node.Env = append(p.node.Env, "PACKET_MARK=1337", "ENABLE_ORIG_SRC=false")
	p.Run(t, "nft", `table inet dedicated {
		chain output {
			type nat hook output priority -100
			oifname != "lo" meta l4proto tcp meta mark & 0xfff != 0x539 redirect to :15001
		}
	}`)
	return p
}

func serverUncapturedDedicated(t *testing.T) {
	m := newMesh(t)
	client, server := m.dedicatedOutbound(t, local), m.uncaptured(t, "server", remote)
	m.write(t, m.config())
	client.startDedicated(t)
	server.echoTwice(t)
	client.request(t, server.At(8080), hello+hello)
	client.node.says(t, access{src: client, dst: server, addr: server.At(8080), sent: 11, recv: 22})
}

func crossNodeCapturedDedicated(t *testing.T) {
	m := newMesh(t)
	client, server := m.dedicatedOutbound(t, local), m.dedicatedOutbound(t, remote)
	m.write(t, m.config())
	client.startDedicated(t)
	server.startDedicated(t)
	server.echoTwice(t)
	client.request(t, server.At(8080), hello+hello)
	client.node.says(t, access{src: client, dst: server, addr: server.At(8080), sent: 11, recv: 22})
	server.node.says(t)
}

// Beyond the real cases: a dedicated ztunnel carries tunnels, in both directions, and
// what it only receives takes no capability.
func TestDedicated(t *testing.T) {
	m := newMesh(t)
	client, server := m.dedicated(t, local), m.dedicated(t, remote)
	client.node.Env = append(client.node.Env, "PACKET_MARK=1337")
	m.write(t, m.config())
	client.startDedicated(t)
	server.startDedicated(t, "setpriv", "--bounding-set=-all", "--inh-caps=-all")
	server.echoTwice(t)
	worldtest.CNI(t, "rules", "install", "--netns", client.Path)
	client.request(t, server.At(8080), hello+hello)
	out, in := direct(client, server)
	client.node.says(t, out)
	server.node.says(t, in)
}
