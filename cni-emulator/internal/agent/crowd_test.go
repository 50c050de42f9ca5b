package agent

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/netnstest"
	"ambient-emulator/internal/testmain"
)

// A snapshot of a thousand pods, and not one descriptor more afterwards.
func TestThousandPods(t *testing.T) {
	const pods = 1000
	n := start(t)
	before := len(testmain.Descriptors())
	spaces := manySpaces(t, pods)
	for i, ns := range spaces {
		n.addNow(named(fmt.Sprint("pod-", i)), ns)
	}
	z := n.ztunnel()
	got := make(map[netns.ID]bool)
	for _, ns := range z.held {
		got[ns.ID()] = true
	}
	for _, ns := range spaces {
		if !got[ns.ID()] {
			t.Fatalf("%v is not in the snapshot", ns.ID())
		}
	}
	z.close()
	for i := range spaces {
		if err := n.del(named(fmt.Sprint("pod-", i)), patience); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the agent holds nothing any more", func() bool { return len(testmain.Descriptors()) == before+pods })
}

// Adds, deletes, ztunnels that come and go, all at once: nothing is lost, nothing
// leaks, and in the end a fresh ztunnel is told exactly what there is.
func TestConcurrent(t *testing.T) {
	n := start(t)
	before := len(testmain.Descriptors())
	// Fewer connections in all than those that come unpaced.
	const workers, rounds, comings = 8, 60, acceptBurst/3 - 5
	spaces := manySpaces(t, workers)
	others := manySpaces(t, workers)

	var ztunnels, verbs sync.WaitGroup
	stop := make(chan struct{})
	for range 3 {
		ztunnels.Add(1)
		go func() {
			defer ztunnels.Done()
			// It leaves after some messages, wherever that is, and comes back; the
			// last time it stays.
			for round := 1; ; round++ {
				p := n.dial()
				if err := p.conn.SendHello(); err != nil {
					t.Errorf("hello: %v", err)
				}
				for left := rand.IntN(40); left > 0 || round == comings; left-- {
					p.conn.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
					req, fd, err := p.conn.ReadRequest()
					if errors.Is(err, os.ErrDeadlineExceeded) {
						select {
						case <-stop:
							p.conn.Close()
							return
						default:
						}
						continue
					}
					if err != nil {
						t.Errorf("read a request: %v", err)
						return
					}
					if fd != fdpass.NoFD {
						unix.Close(fd)
					}
					if req.GetAdd() != nil && rand.IntN(10) == 0 {
						p.conn.Respond("not now")
					} else {
						p.conn.Respond("")
					}
				}
				p.conn.Close()
			}
		}()
	}
	for w := range workers {
		verbs.Add(1)
		go func() {
			defer verbs.Done()
			id := named(fmt.Sprint("pod-", w))
			for range rounds {
				ns := spaces[w]
				if rand.IntN(3) == 0 {
					ns = others[w]
				}
				if _, err := n.add(id, ns, time.Duration(rand.IntN(2))*time.Second); err != nil && !strings.Contains(err.Error(), "says: not now") && !errors.Is(err, errUnconfirmed) {
					t.Errorf("add: %v", err)
				}
				if rand.IntN(2) == 0 {
					if err := n.del(id, patience); err != nil {
						t.Errorf("del: %v", err)
					}
				}
			}
			n.addNow(id, spaces[w])
		}()
	}
	verbs.Wait()
	close(stop)
	ztunnels.Wait()
	eventually(t, "all ztunnels have left", func() bool { return n.connected() == 0 })
	z := n.ztunnel()
	if len(z.held) != workers {
		t.Errorf("%d pods in the snapshot, want %d", len(z.held), workers)
	}
	z.close()
	// What is left: the pods here, and the tests' own namespaces.
	eventually(t, "descriptors are accounted for", func() bool { return len(testmain.Descriptors()) == before+3*workers })
	n.a.mu.Lock()
	defer n.a.mu.Unlock()
	for _, p := range n.a.pods {
		if refs := p.netns.refs.Load(); refs != 1 {
			t.Errorf("%v has %d references", p, refs)
		}
	}
}

// One that is too far behind is dropped, so that nothing grows without bound.
func TestTooFarBehind(t *testing.T) {
	n := start(t)
	z := n.ztunnel()
	ns := manySpaces(t, 1)[0]
	n.addNow(named("web"), ns)
	z.next() // and no answer
	for range maxBehind + 10 {
		if _, err := n.a.Add(named("web"), netnstest.Dup(t, ns), false, nil); err != nil {
			t.Fatal(err)
		}
	}
	z.gone()
	n.await(ErrTooFar.Error())
}

// More ztunnels than there is room for wait in the backlog.
func TestManyZtunnels(t *testing.T) {
	n := start(t)
	peers := make([]*peer, MaxZtunnels)
	for i := range peers {
		peers[i] = n.ztunnel()
	}
	late := n.dial()
	if err := late.conn.SendHello(); err != nil {
		t.Fatal(err)
	}
	if n.connected() != MaxZtunnels {
		t.Errorf("%d ztunnels", n.connected())
	}
	peers[3].close()
	late.expect("snapshot_sent")
}

// Beyond the first ones ztunnels are served at five a second: however slow this
// machine is, the sixth after them has waited for six turns.
func TestZtunnelsArePaced(t *testing.T) {
	n := start(t)
	began := time.Now()
	for range acceptBurst + 6 {
		n.ztunnel().close()
	}
	if took := time.Since(began); took < 6*acceptEvery {
		t.Errorf("%d ztunnels were served within %v", acceptBurst+6, took)
	}
}

// What a thousand pods cost a ztunnel that has just come.
func BenchmarkSnapshot(b *testing.B) {
	const pods = 1000
	n := start(b)
	for i, ns := range manySpaces(b, pods) {
		n.addNow(named(fmt.Sprint("pod-", i)), ns)
	}
	for b.Loop() {
		z := n.ztunnel()
		z.close()
	}
	b.ReportMetric(float64(pods*b.N)/b.Elapsed().Seconds(), "pods/s")
}
