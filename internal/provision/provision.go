// Package provision turns what an operator asked for (flags, a script, Ignition, Butane, cloud-config) into the one plan that the
// guest's agent carries out. It owns which language a document is in and how several are joined; each language has a room below.
// When a plan is carried out, where a request is kept and what a failure means to a machine is internal/machine's.
// Imported by machine, server and daemon.
package provision
