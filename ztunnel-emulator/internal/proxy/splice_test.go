package proxy

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A connection of small exchanges goes through user space, also when it has
// carried much, in one way or another: pipes are for large pieces.
func TestSmallPiecesTakeNoPipe(t *testing.T) {
	r := startRelay(t)
	exchange := func(size, times int) {
		t.Helper()
		sent, got := make([]byte, size), make([]byte, size)
		for range times {
			go r.client.Write(sent)
			if _, err := io.ReadFull(r.server, got); err != nil {
				t.Fatal(err)
			}
		}
	}
	before := openPipes(t)
	expect := func(what string, pipes int) {
		t.Helper()
		if got := openPipes(t) - before; got != 2*pipes {
			t.Errorf("%s: %d descriptors of pipes, not %d", what, got, 2*pipes)
		}
	}
	exchange(1<<10, 3*spliceAfter>>10)
	expect("many small pieces", 0)
	exchange(64*spliceAfter, 1)
	expect("a large piece", 1)
	exchange(1<<10, 2*smallInARow)
	closePipes()
	exchange(1<<10, 100)
	expect("small pieces again", 0)
	r.client.Close()
	r.server.Close()
	r.wait(t)
}

// openPipes returns how many descriptors this process has of pipes, lent or not.
func openPipes(t testing.TB) (n int) {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		// One may have gone: Glob's own.
		if to, err := os.Readlink(link); err == nil && strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
}

// Requests of a KiB, one at a time, of a connection that has carried much.
func BenchmarkSmallPieces(b *testing.B) {
	client, from := tcpPair(b)
	server, to := tcpPair(b)
	ended := make(chan struct{})
	Relay(from, to, func(Counts, error) { close(ended) })
	buf := make([]byte, 1<<10)
	trip := func() {
		client.Write(buf)
		io.ReadFull(server, buf)
		server.Write(buf)
		if _, err := io.ReadFull(client, buf); err != nil {
			b.Fatal(err)
		}
	}
	for range 2 * spliceAfter >> 10 {
		trip()
	}
	for b.Loop() {
		trip()
	}
	client.Close()
	server.Close()
	<-ended
	from.Close()
	to.Close()
}
