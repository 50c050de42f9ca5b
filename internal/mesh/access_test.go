package mesh

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
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
	fmt.Fprintf(&b, "%s access connection complete src.addr=%v:…", level, a.src.ip)
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
	fmt.Fprintf(b, ` %s.workload=%q %[1]s.namespace="default"`, key, p.name)
	if a.hbone != "" {
		fmt.Fprintf(b, ` %s.identity=%q`, key, p.identity())
	}
	fmt.Fprintf(b, ` %s.cluster="Kubernetes"`, key)
}

func addr(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// denied is the line of what has not become a connection.
func denied(src *pod, to netip.AddrPort, direction, err string) string {
	return fmt.Sprintf("warn access connection failed src.addr=%v:… dst.addr=%v direction=%q error=%q", src.ip, to, direction, err)
}

// direct are the two lines of a connection of 11 bytes and 22 back, from pod to pod.
func direct(client, server *pod) (outbound, inbound access) {
	outbound = access{src: client, dst: server, addr: server.at(15008), hbone: server.at(8080).String(), sent: 11, recv: 22}
	inbound = outbound
	inbound.inbound, inbound.sent, inbound.recv = true, outbound.recv, outbound.sent
	return outbound, inbound
}

var (
	timestamp = regexp.MustCompile(`^\S+Z\t`)
	duration  = regexp.MustCompile(`duration="\d+ms"`)
	somePort  = regexp.MustCompile(`(src\.addr=[0-9.]+):\d+`)
)

// lines are the access lines so far, without what differs each time: the time, the
// duration, the client's port.
func (p *process) lines() (lines []string) {
	for line := range strings.Lines(p.out.String()) {
		if !strings.HasSuffix(line, "\n") || !strings.Contains(line, "\taccess\t") {
			continue
		}
		line = strings.TrimSpace(timestamp.ReplaceAllString(line, ""))
		line = somePort.ReplaceAllString(duration.ReplaceAllString(line, `duration="…"`), "$1:…")
		lines = append(lines, strings.ReplaceAll(line, "\t", " "))
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
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		got = n.zt.lines()
		slices.Sort(got)
		if len(got) >= len(all) || time.Now().After(deadline) {
			break
		}
	}
	if !slices.Equal(got, all) {
		t.Errorf("the access lines of %s are\n  %s\nwant\n  %s", nodeNames[n.number], strings.Join(got, "\n  "), strings.Join(all, "\n  "))
	}
}

// line waits for the first access line with all of parts in it.
func (n *node) line(t *testing.T, parts ...string) string {
	t.Helper()
	var found string
	waitFor(t, fmt.Sprintf("access line with %q", parts), func() bool {
		for _, line := range n.zt.lines() {
			if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
				found = line
				return true
			}
		}
		return false
	})
	return found
}
