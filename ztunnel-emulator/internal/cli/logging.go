package cli

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"ambient-emulator/ztunnel-emulator/internal/accesslog"
)

// logging is how log lines look and which are printed: flags, and ztunnel's
// own variables for who gave none.
type logging struct {
	format string // plain or json
	level  string // error, warn, info or debug
}

// Targets of the lines that are not about connections, named as in ztunnel.
const (
	targetApp   = "ztunnel::app"   // the process: start, readiness, stop
	targetInPod = "ztunnel::inpod" // pods coming and going
)

func (l *logging) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&l.format, "log-format", "", "`format` of log lines: plain or json (env LOG_FORMAT; default plain)")
	f.StringVar(&l.level, "log-level", "", "the least `level` that is logged: error, warn, info or debug (env RUST_LOG; default info)")
}

// logger returns the logger that writes such lines to w. A flag beats its variable.
func (l *logging) logger(w io.Writer) (*slog.Logger, error) {
	format, from := l.format, "--log-format "
	if format == "" {
		format, from = os.Getenv("LOG_FORMAT"), "LOG_FORMAT="
	}
	var o accesslog.Options
	switch format {
	case "", "plain":
	case "json":
		o.JSON = true
	default:
		return nil, usageError{fmt.Errorf("%s%s: it takes plain or json", from, format)}
	}

	level, ok := slog.LevelInfo, true
	if l.level != "" {
		if level, ok = levels[l.level]; !ok {
			return nil, usageError{fmt.Errorf("--log-level %s: it takes error, warn, info or debug", l.level)}
		}
	} else if v, found := rustLog(os.Getenv("RUST_LOG")); found {
		level = v
	}
	o.Level = level
	return accesslog.New(w, o).With(accesslog.Target, targetApp), nil
}

// levels are the words of --log-level.
var levels = map[string]slog.Level{
	"error": slog.LevelError, "warn": slog.LevelWarn, "info": slog.LevelInfo, "debug": slog.LevelDebug,
}

// rustLog reads the level for everything from RUST_LOG, a list of directives
// joined by commas. One for a module (h2=off, or a name alone) is passed over,
// since our modules are not ztunnel's; of several plain levels the last holds,
// and a word that is none names a module, as in tracing's EnvFilter.
func rustLog(directives string) (level slog.Level, found bool) {
	for d := range strings.SplitSeq(directives, ",") {
		d = strings.ToLower(strings.TrimSpace(d))
		if l, ok := levels[d]; ok {
			level, found = l, true
		}
		switch d {
		case "trace":
			level, found = accesslog.LevelTrace, true
		case "off":
			level, found = accesslog.LevelOff, true
		}
	}
	return level, found
}
