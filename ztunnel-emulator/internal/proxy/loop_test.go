package proxy

import (
	"errors"
	"log/slog"
	"os"
	"testing"
	"time"
)

// Without the mark that the pods' rules know, what we send comes back to us. That
// is refused before it has eaten all descriptors.
func TestUnmarkedLoop(t *testing.T) {
	const captured = "127.0.7.7:80" // also what we send
	said := &lines{}
	config := &Config{Log: slog.New(slog.NewTextHandler(said, nil)), KeepAlive: DefaultKeepAlive()}
	p := config.NewPod(Identity{}, func(f func() error) error { return f() }, nil)
	w := &world{}
	t.Cleanup(closePipes)
	w.capture(t, captured, p, PortOutbound)
	c := dial(t, captured)
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d connections later: %v", len(p.sessions()), err)
	}
	p.Close()
	said.with(t, "connection failed", errRecursive.Error())
}
