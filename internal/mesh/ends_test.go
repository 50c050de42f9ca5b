package mesh

import (
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"ambient-emulator/internal/worldtest"
)

const drained = "connection closed due to connection drain"

// ztunnelShutdown: what runs goes on while ztunnel waits to end, and nothing new
// comes in.
func ztunnelShutdown(t *testing.T) {
	m := newMesh(t)
	client, server := m.pod(t, "client", local), m.pod(t, "server", local)
	client.node.Env = append(client.node.Env, "CONNECTION_TERMINATION_DEADLINE=1m")
	m.start(t)
	server.echoTwice(t)
	c := client.Dial(t, server.At(8080))
	talks(t, c)
	client.node.ZT.Signal(unix.SIGTERM)
	worldtest.WaitFor(t, "end of the listeners", func() bool {
		late, err := client.Connect(server.At(8080))
		if err == nil {
			late.Close()
		}
		return err != nil
	})
	talks(t, c)
	began := time.Now()
	c.Close()
	client.node.ZT.Wait() // and not after a minute
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("with the last connection gone, ztunnel took %v to end", took)
	}
	if late, err := client.Connect(server.At(8080)); err == nil {
		late.Close()
		t.Error("connected while there is no ztunnel")
	}
}

// serverShutdown: the server's pod is deleted. It takes the connection with it, and
// who comes later gets nowhere.
func serverShutdown(t *testing.T) {
	m := newMesh(t)
	client, server := m.pod(t, "client", local), m.pod(t, "server", remote)
	m.start(t)
	server.echoTwice(t)
	c := client.Dial(t, server.At(8080))
	talks(t, c)
	server.node.del(t, server)
	breaks(t, c)
	client.isRefused(t, server.At(8080)) // by the client's ztunnel, of course
	_, in := direct(client, server)
	in.err = drained
	server.node.says(t, in)
}

// A pod that is deleted takes its tunnels with it at once, those it has made and
// those others have made to it, and nothing of ours keeps its namespace.
func TestPodDeletion(t *testing.T) {
	m := newMesh(t)
	client, gone, server := m.pod(t, "client", local), m.pod(t, "gone", remote), m.pod(t, "server", local)
	m.start(t)
	served := gone.echoTwice(t)
	server.echoTwice(t)
	to, from := client.Dial(t, gone.At(8080)), gone.Dial(t, server.At(8080))
	talks(t, to)
	talks(t, from)
	gone.node.del(t, gone)
	breaks(t, to)
	breaks(t, from)
	_, in := direct(client, gone)
	out, _ := direct(gone, server)
	in.err, out.err = drained, drained
	gone.node.says(t, in, out)
	if got := gone.Run(t, "ss", "-tnH", "sport = :15008 or dport = :15008"); got != "" {
		t.Errorf("in the pod there is still\n%s", got)
	}
	from.Close()
	served.Stop()
	gone.Freed(t)
}

// SIGTERM on the server's side: who uses its tunnels is told to make no new streams
// (GOAWAY), a stream that runs may end by itself, and then so does ztunnel.
func TestDrainTellsSenders(t *testing.T) {
	m := newMesh(t)
	client, server := m.uncaptured(t, "client", local), m.pod(t, "server", remote)
	server.node.Env = append(server.node.Env, "CONNECTION_TERMINATION_DEADLINE=1m")
	m.start(t)
	server.echoTwice(t)
	n := client.dialTunnel(t, server)
	if status, _ := n.connect(t, 1, server.At(8080).String()); status != "200" {
		t.Fatalf("CONNECT is answered with %s", status)
	}
	server.node.ZT.Signal(unix.SIGTERM)
	f, err := n.next()
	if err != nil {
		t.Fatal(err)
	}
	if g, ok := f.(*http2.GoAwayFrame); !ok || g.ErrCode != http2.ErrCodeNo || g.LastStreamID < 1 {
		t.Fatalf("got %v in place of a GOAWAY", f)
	}
	for last := uint32(2); last != 1; { // announced first, then with the number
		if f, err = n.next(); err != nil {
			t.Fatal(err)
		}
		g, ok := f.(*http2.GoAwayFrame)
		if !ok || g.ErrCode != http2.ErrCodeNo {
			t.Fatalf("got %v in place of a GOAWAY", f)
		}
		last = g.LastStreamID
	}
	n.talks(t, 1)
	server.node.ZT.Wait()
	_, in := direct(client, server)
	server.node.says(t, in)
}

// The same with a ztunnel as the sender, and another one that takes the server's pod
// over: the stream that runs is finished in the old tunnel, the next connection gets
// a tunnel to the new ztunnel.
func TestDrainMovesSenders(t *testing.T) {
	m := newMesh(t)
	client, server := m.pod(t, "client", local), m.pod(t, "server", remote)
	server.node.Env = append(server.node.Env, "CONNECTION_TERMINATION_DEADLINE=1m")
	m.start(t)
	server.echoTwice(t)
	c := client.Dial(t, server.At(8080))
	talks(t, c)

	old := server.node.ZT
	heir := *server.node.Node
	heir.Home = m.uncaptured(t, "heir", remote).NS // a network namespace of its own, for its port 15021
	heir.StartZtunnel(t)
	t.Cleanup(func() { heir.ZT.End(t, unix.SIGTERM) })
	worldtest.WaitFor(t, "pod of the next ztunnel", func() bool { return strings.Contains(heir.ZT.Log(), "pod served") })
	old.Signal(unix.SIGTERM)
	old.Says(t, "\tdraining\t")
	worldtest.WaitFor(t, "request by the next ztunnel", func() bool {
		client.request(t, server.At(8080), hello+hello)
		return len(lines(heir.ZT)) > 0
	})
	talks(t, c)
	c.Close()
	old.Wait()
	_, in := direct(client, server)
	in.sent, in.recv = 44, 22
	if got := server.node.line(t, " bytes_sent=44 "); got != in.String() {
		t.Errorf("of the stream that ran it says\n%s\nwant\n%s", got, in)
	}
	client.request(t, server.At(8080), hello+hello)
	for _, line := range append(lines(client.node.ZT), lines(heir.ZT)...) {
		// One ztunnel finds out whether there is another, by connections to itself.
		if !strings.HasPrefix(line, "info ") && !strings.Contains(line, " src.addr=127.0.0.1:") {
			t.Errorf("a connection failed: %s", line)
		}
	}
}

// The same without another ztunnel: who is new is refused at once, in the old tunnel
// and in any other.
func TestDrainRefusesSenders(t *testing.T) {
	m := newMesh(t)
	client, server := m.pod(t, "client", local), m.pod(t, "server", remote)
	server.node.Env = append(server.node.Env, "CONNECTION_TERMINATION_DEADLINE=1m")
	m.start(t)
	server.echoTwice(t)
	c := client.Dial(t, server.At(8080))
	talks(t, c)
	server.node.ZT.Signal(unix.SIGTERM)
	// A request that is on its way when the sender is told is still served.
	served := 0
	worldtest.WaitFor(t, "refusal", func() bool {
		late := client.Dial(t, server.At(8080))
		defer late.Close()
		n, err := io.WriteString(late, hello)
		if err == nil {
			n, err = io.ReadFull(late, make([]byte, 2*len(hello)))
		}
		switch {
		case err == nil:
			served++
			return false
		case n != 0 || !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE):
			t.Errorf("the refusal is %d bytes and %v, want a reset", n, err)
		}
		return true
	})
	talks(t, c)
	c.Close()
	server.node.ZT.Wait()

	soon, soonIn := direct(client, server)
	long, longIn := soon, soonIn
	long.sent, long.recv, longIn.sent, longIn.recv = 22, 44, 44, 22
	refused := soon
	refused.sent, refused.recv, refused.err = 0, 0, "io error: Connection refused (os error 111)"
	outs, ins := []any{long, refused}, []any{longIn}
	for range served {
		outs, ins = append(outs, soon), append(ins, soonIn)
	}
	client.node.says(t, outs...)
	server.node.says(t, ins...)
}

// A connection that does not end by the deadline is cut, and its line says so.
func TestDrainDeadline(t *testing.T) {
	m := newMesh(t)
	client, server := m.pod(t, "client", local), m.pod(t, "server", remote)
	client.node.Env = append(client.node.Env, "CONNECTION_TERMINATION_DEADLINE=200ms")
	m.start(t)
	server.echoTwice(t)
	c := client.Dial(t, server.At(8080))
	talks(t, c)
	client.node.ZT.End(t, unix.SIGTERM)
	c.HearsReset(t)
	out, _ := direct(client, server)
	out.err = drained
	client.node.says(t, out)
}

// The ztunnel of one side is killed and comes back; the other side's is not told,
// and finds out.
func TestZtunnelRestarted(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			m := newMesh(t)
			client, server := m.pod(t, "client", local), m.pod(t, "server", remote)
			m.start(t)
			server.echoTwice(t)
			n := map[string]*node{"client": client.node, "server": server.node}[side]
			c := client.Dial(t, server.At(8080))
			talks(t, c)
			n.ZT.End(t, unix.SIGKILL)
			breaks(t, c)
			if side == "client" {
				if c, err := client.Connect(server.At(8080)); err == nil {
					c.Close()
					t.Error("connected while there is no ztunnel")
				}
			} else {
				client.isRefused(t, server.At(8080))
			}
			n.StartZtunnel(t)
			worldtest.WaitFor(t, "pod", func() bool { return strings.Contains(n.ZT.Log(), "pod served") })
			client.request(t, server.At(8080), hello+hello)
		})
	}
}
