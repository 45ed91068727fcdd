// Package deptest holds the import rules of the project, each with its reason, and checks that every package has its sign on the
// door. Nothing imports it.
package deptest
