package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unicode"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ambient-emulator/cni-emulator/internal/control"
	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/handoff"
)

// runDir is where the daemon's sockets are unless a person says otherwise: root's
// own directory, or the user's. It is never a production path.
func runDir() (string, error) {
	const name = "cni-emulator"
	if os.Geteuid() == 0 {
		return filepath.Join("/run", name), nil
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, name), nil
	}
	return "", errors.New("XDG_RUNTIME_DIR is not set, so there is no place of yours for sockets")
}

// defaultPath returns the path of a file in runDir, or "" if there is no such
// directory; whoever needs the path then says why.
func defaultPath(file string) string {
	dir, err := runDir()
	if err != nil {
		return ""
	}
	return filepath.Join(dir, file)
}

// needPath returns path, or what is to be done when there is none.
func needPath(path, flag string) (string, error) {
	if path != "" {
		return path, nil
	}
	_, err := runDir()
	if err == nil {
		err = errors.New("the path is empty")
	}
	return "", usageError{fmt.Errorf("%w: name the socket with %s", err, flag)}
}

// daemonFlags are the flags of every verb that asks the daemon.
type daemonFlags struct{ control string }

func (d *daemonFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&d.control, "control-uds", defaultPath("control.sock"), "the daemon's socket for verbs")
}

// call asks the daemon, and words what can go wrong with that.
func (d *daemonFlags) call(ctx context.Context, req control.Request, fd int, each func(control.Reply)) error {
	path, err := needPath(d.control, "--control-uds")
	if err != nil {
		return err
	}
	r, err := control.Call(ctx, path, req, fd, each)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ECONNREFUSED):
		return &noAgentError{path, err}
	case err != nil:
		return err
	case r.Unconfirmed:
		// The daemon's words say it already.
		return unconfirmedError{errors.New(printable(r.Error))}
	case r.Error != "":
		return errors.New(printable(r.Error))
	}
	return nil
}

// noAgentError is nobody at the daemon's socket.
type noAgentError struct {
	path string
	err  error
}

func (e *noAgentError) Error() string {
	return fmt.Sprintf("no agent listens at %s: start one with `cni-emulator serve`, or name its socket with --control-uds", e.path)
}
func (e *noAgentError) Unwrap() error { return e.err }

// ask is call for a verb that sends no descriptor.
func (d *daemonFlags) ask(ctx context.Context, req control.Request, each func(control.Reply)) error {
	return d.call(ctx, req, fdpass.NoFD, each)
}

// unconfirmedError makes an error one of exit code 3.
type unconfirmedError struct{ error }

func (unconfirmedError) Is(target error) bool { return target == handoff.ErrNotConfirmed }

// printable makes a ztunnel's words, or a path, safe for a terminal. A ztunnel's
// longer ones have several lines.
func printable(s string) string {
	s = strings.ReplaceAll(s, "\n", "; ")
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, s)
}
