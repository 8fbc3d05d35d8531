package swtpmargs

import (
	"bytes"
	"strings"
)

// ConfigFile is swtpm_setup.conf(5) where neither the command line nor the
// user's own folder has one.
const ConfigFile = "/etc/swtpm_setup.conf"

// MaxConfig bounds, in bytes, a swtpm_setup.conf that is read.
const MaxConfig = 64 << 10

// WithCertsTool gives a swtpm_setup.conf whose certificates are made by tool.
// All else stays as the admin has it: the PCR banks, the profiles.
func WithCertsTool(conf []byte, tool string) []byte {
	var out bytes.Buffer
	for line := range bytes.Lines(conf) {
		key, _, _ := bytes.Cut(line, []byte("="))
		switch strings.TrimSpace(string(key)) {
		case "create_certs_tool", "create_certs_tool_config", "create_certs_tool_options":
			continue
		}
		out.Write(line)
	}
	if b := out.Bytes(); len(b) > 0 && b[len(b)-1] != '\n' {
		out.WriteByte('\n')
	}
	out.WriteString("create_certs_tool = " + tool + "\n")
	return out.Bytes()
}

// ConfigFiles gives where swtpm_setup looks for its configuration, in its order:
// the command line's file alone, if it names one; else the user's own, then the
// system's. env is the program's environment.
func (c Call) ConfigFiles(env []string) []string {
	if c.Config != "" {
		return []string{c.Config}
	}
	var files []string
	get := func(name string) string {
		for _, e := range env {
			if v, ok := strings.CutPrefix(e, name+"="); ok {
				return v
			}
		}
		return ""
	}
	if d := get("XDG_CONFIG_HOME"); d != "" {
		files = append(files, d+"/swtpm_setup.conf")
	} else if d := get("HOME"); d != "" {
		files = append(files, d+"/.config/swtpm_setup.conf")
	}
	return append(files, ConfigFile)
}
