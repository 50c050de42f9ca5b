package proxy

import (
	"io"
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
	exchange(1<<10, 3*spliceAfter>>10)
	if n := freePipes(); n != 0 {
		t.Errorf("many small pieces: %d pipes", n)
	}
	exchange(64*spliceAfter, 1)
	if n := freePipes(); n != 1 {
		t.Errorf("a large piece: %d pipes", n)
	}
	exchange(1<<10, 2*smallInARow)
	closePipes()
	exchange(1<<10, 100)
	if n := freePipes(); n != 0 {
		t.Errorf("small pieces again: %d pipes", n)
	}
}

func freePipes() int {
	pipes.Lock()
	defer pipes.Unlock()
	return len(pipes.free)
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
