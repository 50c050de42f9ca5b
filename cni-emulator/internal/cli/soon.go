package cli

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// justStarting is how long a server may take from its start to its socket.
const justStarting = time.Second

// soon tries again for a moment while nobody listens at the socket: people type
// "server &" and the call to it in one go. The error is the last try's.
func soon(ctx context.Context, path string, try func() error) error {
	for until := time.Now().Add(justStarting); ; {
		err := try()
		if err == nil || !mayCome(path, err) || time.Now().After(until) {
			return err
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// mayCome tells whether a server may be about to listen there: its folder is there,
// and at its path nothing, or the socket of one that has ended.
func mayCome(path string, err error) bool {
	switch {
	case errors.Is(err, unix.ENOENT):
		_, err := os.Stat(filepath.Dir(path))
		return err == nil
	case errors.Is(err, unix.ECONNREFUSED):
		st, err := os.Stat(path)
		return err == nil && st.Mode().Type() == fs.ModeSocket
	}
	return false
}
