package mesh

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"ambient-emulator/internal/worldtest"
)

// access is an access line, as reference/observability.md, section 6, has it. The
// metrics that the real cases look at say the same; they are not built yet, so
// here the lines are all there is.
type access struct {
	src, dst   *pod           // dst may be nil: nobody that is known
	addr       netip.AddrPort // where the connection went
	hbone      string         // what was asked for in a tunnel; with one, identities
	service    string         // its hostname
	inbound    bool
	sent, recv int // by the pod whose line it is
	err        string
}

// String is the line without what differs each time; see lines.
func (a access) String() string {
	var b strings.Builder
	level, direction := "info", "outbound"
	if a.err != "" {
		level = "error"
	}
	if a.inbound {
		direction = "inbound"
	}
	fmt.Fprintf(&b, "%s access connection complete src.addr=%s", level, anyPort(a.src))
	a.party(&b, "src", a.src)
	fmt.Fprintf(&b, " dst.addr=%v", a.addr)
	if a.hbone != "" {
		fmt.Fprintf(&b, " dst.hbone_addr=%s", a.hbone)
	}
	if a.service != "" {
		fmt.Fprintf(&b, " dst.service=%q", a.service)
	}
	if a.dst != nil {
		a.party(&b, "dst", a.dst)
	}
	fmt.Fprintf(&b, ` direction=%q bytes_sent=%d bytes_recv=%d duration="…"`, direction, a.sent, a.recv)
	if a.err != "" {
		fmt.Fprintf(&b, " error=%q", a.err)
	}
	return b.String()
}

func (a access) party(b *strings.Builder, key string, p *pod) {
	fmt.Fprintf(b, ` %s.workload=%q %[1]s.namespace="default"`, key, p.Name)
	if a.hbone != "" {
		fmt.Fprintf(b, ` %s.identity=%q`, key, p.identity())
	}
	fmt.Fprintf(b, ` %s.cluster="Kubernetes"`, key)
}

func addr(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// denied is the line of what has not become a connection.
func denied(src *pod, to netip.AddrPort, direction, err string) string {
	return fmt.Sprintf("warn access connection failed src.addr=%s dst.addr=%v direction=%q error=%q", anyPort(src), to, direction, err)
}

func anyPort(p *pod) string {
	return worldtest.AnyPort("src.addr=" + p.At(1).String())[len("src.addr="):]
}

// direct are the two lines of a connection of 11 bytes and 22 back, from pod to pod.
func direct(client, server *pod) (outbound, inbound access) {
	outbound = access{src: client, dst: server, addr: server.At(15008), hbone: server.At(8080).String(), sent: 11, recv: 22}
	inbound = outbound
	inbound.inbound, inbound.sent, inbound.recv = true, outbound.recv, outbound.sent
	return outbound, inbound
}

// lines are the access lines so far, without the client's port too.
func lines(p *worldtest.Process) []string {
	lines := p.Lines()
	for i, line := range lines {
		lines[i] = worldtest.AnyPort(line)
	}
	return lines
}

// says waits until the node's ztunnel has said these access lines, in any order.
// There must be no others.
func (n *node) says(t *testing.T, want ...any) {
	t.Helper()
	all := make([]string, len(want))
	for i, w := range want {
		all[i] = fmt.Sprint(w)
	}
	slices.Sort(all)
	var got []string
	for deadline := time.Now().Add(worldtest.Patience); ; time.Sleep(2 * time.Millisecond) {
		got = lines(n.ZT)
		slices.Sort(got)
		if len(got) >= len(all) || time.Now().After(deadline) {
			break
		}
	}
	if !slices.Equal(got, all) {
		t.Errorf("the access lines of %s are\n  %s\nwant\n  %s", nodeNames[n.number], strings.Join(got, "\n  "), strings.Join(all, "\n  "))
	}
}

// line waits for the one access line with all of parts in it.
func (n *node) line(t *testing.T, parts ...string) string {
	t.Helper()
	return worldtest.AnyPort(n.ZT.Line(t, parts...))
}
